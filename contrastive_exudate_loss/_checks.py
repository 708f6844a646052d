"""What to say when an option or a tensor is not what a loss needs."""

import numbers
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

LARGEST = torch.finfo(torch.float32).max
GREY = 200  # a mask with such values beside others is a grey image rather than an index mask
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def warn(sentence: str) -> None:
    """Warn at the line that called the package, past frames of it and of torch; in compiled code at its own line."""
    level = 2
    if not torch.compiler.is_compiling():
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(
            (f"{__package__}.", "torch.")
        ):
            frame, level = frame.f_back, level + 1
    warnings.warn(sentence, stacklevel=level)


def check_integer(name: str, value: object, minimum: int) -> None:
    """Raise unless value is an integer, not a bool, and >= minimum."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int >= {minimum}, got {_shown(value)}")
    if value < minimum:
        raise ValueError(f"{name} must be an int >= {minimum}, got {value}")


def check_number(name: str, value: object, minimum: float, below: float = LARGEST) -> None:
    """Raise unless value is a real number, not a bool, with minimum <= value < below."""
    expected = f"a number >= {minimum} and " + ("finite in float32" if below == LARGEST else f"< {below}")
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be {expected}, got {_shown(value)}")
    if not minimum <= value < below:  # type: ignore[operator]  # numbers.Real has no types for it
        raise ValueError(f"{name} must be {expected}, got {value}")


def plain_option(value: Any) -> Any:
    """An option as a plain Python value, where a configuration file or NumPy gave one of its own."""
    if isinstance(value, (bool, str)) or value is None:
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, Sequence):
        return tuple(map(plain_option, value))
    if hasattr(value, "tolist") and not isinstance(value, Tensor):  # a NumPy array
        return plain_option(value.tolist())
    return value


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise unless value is one of the choices."""
    expected = " or ".join(repr(choice) for choice in choices)
    if not isinstance(value, str):
        raise TypeError(f"{name} must be {expected}, got {_shown(value)}")
    if value not in choices:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def check_flag(name: str, value: object) -> None:
    """Raise unless value is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {_shown(value)}")


def check_radius(name: str, value: object, *, pairs: bool) -> None:
    """Raise unless value is an integer >= 1 or, if pairs are allowed, a sequence of two of them."""
    if isinstance(value, numbers.Integral):
        check_integer(name, value, 1)
        return
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{name} must be an int >= 1 or a pair of ints, got {_shown(value)}")
    if len(value) != 2:
        raise ValueError(f"{name} must be an int >= 1 or a pair (for sparse patches, for dense patches), got {value!r}")
    if not pairs:
        raise ValueError(f"{name} must be an int >= 1 unless density_threshold is given, got the pair {value!r}")
    for radius in value:
        check_integer(name, radius, 1)


def check_classes(value: object, ignore_index: int | None) -> None:
    """Raise unless value is a sequence of distinct integers >= 0 without ignore_index."""
    expected = "classes must be a sequence of distinct integers >= 0, such as range(1, 5)"
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{expected}, got {_shown(value)}")
    if not all(isinstance(number, numbers.Integral) and not isinstance(number, bool) for number in value):
        raise TypeError(f"{expected}, got {value!r}; for regions of several classes give masks as the target instead")
    if not value or min(value) < 0 or len(set(value)) < len(value):
        raise ValueError(f"{expected}, got {value!r}")
    if ignore_index in value:
        raise ValueError(f"classes must not hold ignore_index = {ignore_index}, got {value!r}")


def check_part(name: str, part: object, kind: type[nn.Module], ignore_index: int | None, *, always: bool) -> None:
    """Raise unless part is a `kind` with the criterion's ignore_index; None accepts any, unless always."""
    if not isinstance(part, kind):
        raise TypeError(f"{name} must be None or a {kind.__name__}, got {type(part).__name__}")
    if (always or ignore_index is not None) and part.ignore_index != ignore_index:
        raise ValueError(
            f"{name} must have ignore_index={ignore_index} like the criterion, got {part.ignore_index}; give both "
            "the same"
        )


def check_ignore_index(value: object) -> None:
    """Raise unless value is None or an int that is neither 0 nor 1."""
    if value is None:
        return
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"ignore_index must be None or an int, got {_shown(value)}")
    if value in (0, 1):
        raise ValueError(
            f"ignore_index must be neither 0 (background) nor 1 (lesion), got {value}; mark ignored pixels with "
            "another value, such as -1"
        )
    if not holds(torch.int64, int(value)):
        raise ValueError(f"ignore_index must fit int64, got {value}")


def check_target(target: Tensor) -> None:
    """Raise unless target is a (B, K, H, W) real tensor without an empty axis; its values are checked elsewhere."""
    _check_images("target", target, "(B, K, H, W)", _other_axes("target", target))
    if target.is_complex():
        raise TypeError(f"target must be bool, integer or floating, got {target.dtype}")


def check_index(index: Tensor, name: str = "index") -> None:
    """Raise unless index is a (B, H, W) or (B, 1, H, W) integer tensor without an empty axis."""
    _check_tensor(name, index, "(B, H, W) or (B, 1, H, W)")
    shape = tuple(index.shape)
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[1] != 1):
        remedy = "give the class of each pixel, or leave classes out if the target is one mask per lesion"
        if len(shape) == 4 and shape[3] == 1:
            remedy = f"drop the last axis with {name}.squeeze(3)"
        elif len(shape) == 2:
            remedy = f"add the batch axis with {name}[None]"
        elif len(shape) == 5:
            remedy = "images are 2-D: give slices of volumes as a batch"
        raise ValueError(
            f"{name} must be an index mask, (B, H, W) or (B, 1, H, W), when classes are given, got {shape}; {remedy}"
        )
    if index.numel() == 0:
        raise ValueError(f"{name} must be (B, H, W) with no axis of length 0, got {shape}")
    if index.dtype == torch.bool or index.is_floating_point() or index.is_complex():
        remedy = f"give {name}.long()" + ("" if index.dtype == torch.bool else " if it holds whole numbers")
        raise TypeError(f"{name} must be an integer index mask when classes are given, got {index.dtype}; {remedy}")


def check_index_values(index: Tensor, classes: int, ignore_index: int | None) -> None:
    """Raise unless every value of an index mask, int64, is below classes or ignore_index; waits for the device."""
    allowed = (index >= 0) & (index < classes)
    if ignore_index is not None:
        allowed |= index == ignore_index
    if not bool(allowed.all()):
        wrong = index[~allowed].unique()
        ignored = "" if ignore_index is None else f" or ignore_index = {ignore_index}"
        remedy = (
            "give the network one channel for each class, including the background, and set ignore_index if a value "
            "marks pixels to leave out"
        )
        if wrong.tolist() == [255]:
            remedy = (
                "turn a 0/255 mask into (target > 127).long(); give ignore_index=255 only if 255 marks pixels to leave "
                "out, since it would ignore every lesion marked so"
            )
        elif int(wrong[-1]) >= GREY:
            remedy = "turn a grey mask, as JPEG compression and resizing produce, into (target > 127).long()"
        raise ValueError(
            f"target must hold classes from 0 to {classes - 1}, one for each channel of logits{ignored}, got "
            f"{', '.join(map(str, wrong[:5].tolist()))}; {remedy}"
        )


def check_logits(logits: Tensor, target: Tensor) -> None:
    """Raise unless logits is floating and of the shape and device of the (checked) target, a mask."""
    _check_images("logits", logits, "(B, K, H, W)", _other_axes("logits", logits))
    _check_floating("logits", logits)
    _check_device("logits", logits, target)
    if logits.shape != target.shape:
        raise ValueError(
            f"logits must be (B, K, H, W) = {tuple(target.shape)} like target, got {tuple(logits.shape)}"
            + _remedy(logits, target)
        )


def check_class_logits(logits: Tensor, index: Tensor) -> None:
    """Raise unless logits is floating, (B, C, H, W) with any C, of the size and device of the (checked) index mask."""
    _check_images("logits", logits, "(B, C, H, W)", _other_axes("logits", logits))
    _check_floating("logits", logits)
    _check_device("logits", logits, index)
    wanted = index.shape[0], *index.shape[-2:]
    if (logits.shape[0], *logits.shape[2:]) != wanted:
        raise ValueError(
            f"logits must be (B, C, H, W) with B, H, W = {wanted} like target, got {tuple(logits.shape)}"
            + _other_size(logits, index)
        )


def check_features(features: Tensor, target: Tensor) -> None:
    """Raise unless features is floating, (B, C >= 2, h, w), with the batch and device of the (checked) target."""
    _check_images("features", features, "(B, C, h, w)", "give one feature map per image, channels second")
    _check_floating("features", features)
    _check_device("features", features, target)
    if features.shape[0] != target.shape[0]:
        raise ValueError(
            f"features must be (B, C, h, w) with target's B = {target.shape[0]}, got {tuple(features.shape)}"
        )
    if features.shape[1] < 2:
        raise ValueError(
            f"features must have at least 2 channels, since a direction needs two, got {tuple(features.shape)}; "
            "give the output of a deeper layer"
        )


def check_target_values(target: Tensor, ignore_index: int | None) -> None:
    """Raise unless every value of target is 0, 1 or ignore_index; reads the values, so it waits for the device."""
    if target.dtype == torch.bool:
        return
    allowed = (target == 0) | (target == 1)
    ignored_value = held(target, ignore_index)
    if ignored_value is not None:
        allowed |= target == ignored_value
    if bool(allowed.all()):
        return
    wrong = target.double()[~allowed].unique()
    ignored = "" if ignore_index is None else f" and ignore_index = {ignore_index}"
    shown = ", ".join(dict.fromkeys(f"{value:g}" for value in wrong[:5].tolist()))
    remedy = _value_remedy(wrong, ignore_index)
    raise ValueError(f"target must hold only 0 and 1{ignored}, got {shown} (dtype {target.dtype}); {remedy}")


def may_read(target: Tensor) -> bool:
    """Whether the target's values can be read: not in compiled code, nor while a CUDA graph is captured."""
    if torch.compiler.is_compiling() or target.is_meta:
        return False
    return not (target.is_cuda and torch.cuda.is_current_stream_capturing())


def held(target: Tensor, ignore_index: int | None) -> int | None:
    """The value to ignore; None also where the target cannot hold it."""
    return ignore_index if ignore_index is not None and holds(target.dtype, ignore_index) else None


def holds(dtype: torch.dtype, value: int) -> bool:
    """Whether a tensor of this dtype can hold the integer exactly.

    Torch compares after rounding to the tensor's dtype (156 == -100 in uint8), so only such a value may be compared.
    """
    if dtype == torch.bool:
        return value in (0, 1)
    if not dtype.is_floating_point:
        limits = torch.iinfo(dtype)
        return limits.min <= value <= limits.max
    # A float holds an integer if its odd part fits the mantissa, which counts up to 2 / eps.
    odd = abs(value) // max(value & -value, 1)
    return abs(value) <= torch.finfo(dtype).max and odd <= 2 / torch.finfo(dtype).eps


def _check_tensor(name: str, value: object, axes: str) -> None:
    if not isinstance(value, Tensor):
        remedy = ""
        if hasattr(value, "__array__") or isinstance(value, (list, tuple)):
            remedy = "; make it one with torch.as_tensor"
        elif isinstance(value, Mapping):
            remedy = f"; give one of its values: {', '.join(f'output[{key!r}]' for key in list(value)[:5])}"
        raise TypeError(f"{name} must be a {axes} torch.Tensor, got {type(value).__name__}{remedy}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense {axes} tensor, got layout {value.layout}; call {name}.to_dense()")


def _check_images(name: str, value: Any, axes: str, remedy: str) -> None:
    _check_tensor(name, value, axes)
    if value.dim() != 4:
        raise ValueError(f"{name} must be {axes}, got {tuple(value.shape)}; {remedy}")
    if value.numel() == 0:
        raise ValueError(f"{name} must be {axes} with no axis of length 0, got {tuple(value.shape)}")


def _other_axes(name: str, value: object) -> str:
    """What to do with a value that does not have four axes."""
    axes = value.dim() if isinstance(value, Tensor) else 0
    if axes == 2:
        return f"add the batch and the class axis with {name}[None, None]"
    if axes == 3:
        several = (
            "; if it holds the class of each pixel, give the criterion classes=range(1, number of classes) instead"
        )
        return f"add the class axis with {name}.unsqueeze(1)" + (several if name == "target" else "")
    if axes == 5:
        return (
            "images are 2-D: give slices of volumes as a batch; if axis 1 stacks the levels of deep supervision, make "
            f"them a list with {name}.unbind(1)"
        )
    return "give a batch of 2-D images"


def _value_remedy(wrong: Tensor, ignore_index: int | None) -> str:
    """What to do with a target of values other than 0 and 1; wrong holds each of these once, in rising order."""
    if wrong.numel() == 1 and float(wrong[0]) == 255:
        return (
            "turn a 0/255 mask into target > 127; give ignore_index=255 only if 255 marks pixels to leave out, since "
            "all pixels marked 255 are then ignored, lesions included"
        )
    if not bool(wrong.isfinite().all()):
        return "find the step that makes NaN or infinity, such as a division by 0; every pixel must have a finite value"
    whole = bool((wrong == wrong.round()).all())
    if whole and float(wrong[0]) >= 2 and len(wrong) == 1 and ignore_index is None:
        value = int(wrong[0])
        return (
            f"if {value} marks lesions, give target == {value}; if it marks pixels to leave out, ignore_index={value}; "
            f"if target holds the class of each pixel, give CombinedExudateLoss classes=range(1, {value + 1}) and the "
            "index mask as (B, H, W)"
        )
    if float(wrong[0]) >= 0 and float(wrong[-1]) >= GREY:
        return "if it is a grey mask, as JPEG compression and resizing produce, binarize it with target > 127"
    if whole and float(wrong[0]) >= 2 and len(wrong) > 1:
        return (
            f"if it holds the class of each pixel, give CombinedExudateLoss classes=range(1, {int(wrong[-1]) + 1}) and "
            "the index mask as (B, H, W); if a value marks pixels to leave out, give it as ignore_index"
        )
    if not whole and float(wrong[0]) > 0 and float(wrong[-1]) < 1:
        return "threshold a mask that was resized or smoothed, for example with target > 0.5"
    return "say which values are lesion, as in target == value, and set ignore_index if one marks pixels to leave out"


def _check_floating(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _FLOATING:
        raise TypeError(
            f"{name} must be floating, of at least 16 bits, got {tensor.dtype}; give the network's own output"
        )


def _check_device(name: str, tensor: Tensor, target: Tensor) -> None:
    if tensor.device != target.device:
        raise ValueError(
            f"{name} must be on target's device {target.device}, got {tensor.device}; move target with "
            f"target.to({name}.device)"
        )


def _remedy(logits: Tensor, target: Tensor) -> str:
    if logits.shape[0] != target.shape[0] or logits.shape[2:] != target.shape[2:]:
        if target.shape[3] == 1 and target.shape[1:3] == logits.shape[2:]:
            return "; move target's class axis to second place with target.movedim(3, 1)"
        return _other_size(logits, target)
    if target.shape[1] == 1 and not target.is_floating_point():
        return (
            f"; if target holds the class of each pixel, give the criterion classes=range(1, {logits.shape[1]}), "
            "without the background"
        )
    remedy = (
        "; give one target channel of 0 and 1 per lesion class, none for the background, and as many logit channels"
    )
    if target.shape[1] == logits.shape[1] + 1:
        remedy += (
            "; if the first channel is the background, give target[:, 1:]; if the last marks pixels to ignore, as in "
            "nnU-Net's region training, give target[:, :-1].float().masked_fill(target[:, -1:] > 0, -1) and "
            "ignore_index=-1"
        )
    return remedy


def _other_size(logits: Tensor, target: Tensor) -> str:
    if logits.shape[0] != target.shape[0]:
        return "; logits and target must come from the same batch"
    return (
        "; resize logits with torch.nn.functional.interpolate(logits, size=target.shape[-2:]); for deep supervision "
        "give the criterion the list of logits, and supervised= the wrapper that weighs the levels"
    )


def _shown(value: object) -> str:
    return f"a {type(value).__name__}" if isinstance(value, nn.Module) else f"{value!r} of type {type(value).__name__}"
