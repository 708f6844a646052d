"""What to say when an option or a tensor is not what a loss needs."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

LARGEST = torch.finfo(torch.float32).max
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_integer(name: str, value: object, minimum: int) -> None:
    """Raise unless value is an int, not a bool, and >= minimum."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int >= {minimum}, got {_shown(value)}")
    if value < minimum:
        raise ValueError(f"{name} must be an int >= {minimum}, got {value}")


def check_number(name: str, value: object, minimum: float, below: float = LARGEST) -> None:
    """Raise unless value is an int or float with minimum <= value < below."""
    expected = f"a number >= {minimum} and " + ("finite in float32" if below == LARGEST else f"< {below}")
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be {expected}, got {_shown(value)}")
    if not minimum <= value < below:
        raise ValueError(f"{name} must be {expected}, got {value}")


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
    """Raise unless value is an int >= 1 or, where pairs make sense, a pair of such."""
    if isinstance(value, int):
        check_integer(name, value, 1)
        return
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name} must be an int >= 1 or a pair of ints, got {_shown(value)}")
    if len(value) != 2:
        raise ValueError(f"{name} must be an int >= 1 or a pair (in sparse patches, in dense patches), got {value!r}")
    if not pairs:
        raise ValueError(f"{name} must be an int >= 1 unless density_threshold is given, got the pair {value!r}")
    for radius in value:
        check_integer(name, radius, 1)


def check_part(name: str, part: object, kind: type[nn.Module], ignore_index: int | None) -> None:
    """Raise unless part is a kind whose ignore_index does not contradict this one."""
    if not isinstance(part, kind):
        raise TypeError(f"{name} must be None or a {kind.__name__}, got {type(part).__name__}")
    if ignore_index is not None and part.ignore_index != ignore_index:
        raise ValueError(
            f"{name} must have ignore_index={ignore_index} like the criterion, got {part.ignore_index}; give both "
            "the same"
        )


def check_ignore_index(value: object) -> None:
    """Raise unless value is None or an int that is neither 0 nor 1."""
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"ignore_index must be None or an int, got {_shown(value)}")
    if value in (0, 1):
        raise ValueError(
            f"ignore_index must be neither 0 (background) nor 1 (lesion), got {value}; mark ignored pixels with "
            "another value, such as -1"
        )
    if not holds(torch.int64, value):
        raise ValueError(f"ignore_index must fit int64, got {value}")


def check_target(target: Tensor) -> None:
    """Raise unless target is a (B, K, H, W) real tensor without an empty axis; its values are checked elsewhere."""
    _check_images("target", target, "(B, K, H, W)", _other_axes("target", target))
    if target.is_complex():
        raise TypeError(f"target must be bool, integer or floating, got {target.dtype}")


def check_logits(logits: Tensor, target: Tensor) -> None:
    """Raise unless logits is floating and of the shape and device of the (checked) target."""
    _check_images("logits", logits, "(B, K, H, W)", _other_axes("logits", logits))
    _check_floating("logits", logits)
    _check_device("logits", logits, target)
    if logits.shape != target.shape:
        raise ValueError(
            f"logits must be (B, K, H, W) = {tuple(target.shape)} like target, got {tuple(logits.shape)}"
            + _remedy(logits, target)
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
    if ignore_index is not None and holds(target.dtype, ignore_index):
        allowed |= target == ignore_index
    if bool(allowed.all()):
        return
    wrong = target.double()[~allowed].unique()[:5].tolist()
    ignored = "" if ignore_index is None else f" and ignore_index = {ignore_index}"
    raise ValueError(
        f"target must hold only 0 and 1{ignored}, got {', '.join(dict.fromkeys(f'{value:g}' for value in wrong))}"
        f" (dtype {target.dtype}); turn a 0/255 mask into target > 127 (ignore_index=255 would ignore every lesion), "
        "resize masks with mode='nearest', and give ignore_index if a value marks pixels to leave out"
    )


def may_read(target: Tensor) -> bool:
    """Whether the target's values can be read: not in compiled code, nor while a CUDA graph is captured."""
    if torch.compiler.is_compiling() or target.is_meta:
        return False
    return not (target.is_cuda and torch.cuda.is_current_stream_capturing())


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


def _check_images(name: str, value: object, axes: str, remedy: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a {axes} torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense {axes} tensor, got layout {value.layout}; call {name}.to_dense()")
    if value.dim() != 4:
        raise ValueError(f"{name} must be {axes}, got {tuple(value.shape)}; {remedy}")
    if value.numel() == 0:
        raise ValueError(f"{name} must be {axes} with no axis of length 0, got {tuple(value.shape)}")


def _other_axes(name: str, value: object) -> str:
    """What to do with a value that has not four axes."""
    axes = value.dim() if isinstance(value, Tensor) else 0
    if axes == 2:
        return f"add the batch and the class axis with {name}[None, None]"
    if axes == 3:
        several = "; an index mask becomes a channel for each lesion by torch.nn.functional.one_hot"
        return f"add the class axis with {name}.unsqueeze(1)" + (several if name == "target" else "")
    return "give images, of volumes their slices"


def _check_floating(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _FLOATING:
        raise TypeError(
            f"{name} must be floating, of 16 bits at least, got {tensor.dtype}; give the network's own output"
        )


def _check_device(name: str, tensor: Tensor, target: Tensor) -> None:
    if tensor.device != target.device:
        raise ValueError(
            f"{name} must be on target's device {target.device}, got {tensor.device}; move target with "
            f"target.to({name}.device)"
        )


def _remedy(logits: Tensor, target: Tensor) -> str:
    if logits.shape[0] != target.shape[0]:
        return "; logits and target must come from the same batch"
    if logits.shape[1] != target.shape[1]:
        return "; give one target channel of 0 and 1 per lesion class, none for the background"
    return "; resize logits with torch.nn.functional.interpolate(logits, size=target.shape[-2:])"


def _shown(value: object) -> str:
    return f"{value!r} of type {type(value).__name__}"
