"""Index masks, regions, deep supervision and classes that are absent: laws, with loops as oracle."""

import itertools

import monai.losses
import numpy as np
import pytest
import reference
import segmentation_models_pytorch as smp
import torch
from batches import gradients
from hypothesis import given
from hypothesis import strategies as st
from monai.data import MetaTensor
from torch import nn

from contrastive_exudate_loss import (
    CombinedExudateLoss,
    FeatureTap,
    PatchDensityContrastLoss,
    PatchEdgeContrastLoss,
    lesion_masks,
)

INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
FIXED = {"alpha": 0.02, "beta": 0.1}


@st.composite
def index_masks(draw):
    """An index mask of classes 0 to 5 of any integer dtype, classes that are lesions, and a value to ignore or None."""
    classes = draw(st.lists(st.integers(0, 5), min_size=1, max_size=4, unique=True))
    left = sorted(set(range(2, 6)) - set(classes))
    ignore_index = draw(st.sampled_from([None, -1, -100, 255, *left[:1]]))
    dtype = draw(st.sampled_from(INTEGERS))
    index = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 6, (2, draw(st.integers(1, 9)), 7))
    if ignore_index is not None and torch.iinfo(dtype).min <= ignore_index <= torch.iinfo(dtype).max:
        index[:, :1] = ignore_index
    index = torch.tensor(index).to(dtype)
    return (index.unsqueeze(1) if draw(st.booleans()) else index), classes, ignore_index


@given(index_masks())
def test_lesion_masks_equal_loops_over_pixels(case):
    index, classes, ignore_index = case
    masks = lesion_masks(index, classes, ignore_index=ignore_index)
    flat = index.reshape(len(index), *index.shape[-2:])
    assert masks.shape == (len(flat), len(classes), *flat.shape[1:])
    for b, i, j in itertools.product(*map(range, flat.shape)):
        value = int(flat[b, i, j])
        wanted = [value if value == ignore_index else int(value == number) for number in classes]
        assert masks[b, :, i, j].tolist() == wanted


@pytest.mark.parametrize(
    ("ignore_index", "dtype"),
    [
        (None, torch.uint8),
        (255, torch.uint8),
        (-1, torch.int8),
        (300, torch.int16),
        (-(2**20), torch.int32),
        (2**40, torch.int64),
    ],
)
def test_lesion_masks_have_the_smallest_dtype_that_holds_their_values(ignore_index, dtype):
    assert lesion_masks(torch.zeros(1, 2, 2, dtype=torch.int64), [1], ignore_index=ignore_index).dtype == dtype


def batch(classes=5, dtype=torch.int64, ignored=None):
    """Logits made from features, and an index mask with two lesions, of classes 1 and 3."""
    torch.manual_seed(0)
    features = torch.randn(2, 6, 32, 32, requires_grad=True)
    logits = nn.Conv2d(6, classes, 1)(features)
    index = torch.zeros(2, 32, 32, dtype=dtype)
    index[:, 4:12, 5:14] = 1
    index[0, 20:24, 20:29] = 3
    if ignored is not None:
        index[:, -3:] = ignored
    return logits, index, features


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("axis", [False, True])
@pytest.mark.parametrize("ignore_index", [None, -1, -100, 255])
def test_an_index_mask_is_its_lesion_masks_and_cross_entropy(dtype, axis, ignore_index):
    if ignore_index is not None and not torch.iinfo(dtype).min <= ignore_index <= torch.iinfo(dtype).max:
        ignore_index = 5
    logits, index, features = batch(dtype=dtype, ignored=ignore_index)
    criterion = CombinedExudateLoss(**FIXED, classes=range(1, 5), ignore_index=ignore_index)
    terms = criterion.terms(logits, index.unsqueeze(1) if axis else index, features)
    options = {} if ignore_index is None else {"ignore_index": ignore_index}
    wanted = nn.functional.cross_entropy(logits, index.long(), **options)
    torch.testing.assert_close(terms.supervised, wanted)
    masks = lesion_masks(index, range(1, 5), ignore_index=ignore_index)
    assert torch.equal(terms.density, PatchDensityContrastLoss(ignore_index=ignore_index)(features, masks))
    assert torch.equal(terms.edge, PatchEdgeContrastLoss(ignore_index=ignore_index)(features, masks))


def test_classes_may_be_left_out_and_logits_may_have_any_number_of_channels():
    logits, index, features = batch(classes=9)
    some = CombinedExudateLoss(**FIXED, classes=[3]).terms(logits, index, features)
    assert torch.equal(some.edge, PatchEdgeContrastLoss()(features, (index == 3).unsqueeze(1)))


def test_infinite_logits_at_ignored_pixels_do_no_harm():
    logits, index, features = batch(ignored=255)
    logits = logits.detach()
    logits[:, :, -3:] = torch.inf
    logits.requires_grad_()
    loss = CombinedExudateLoss(**FIXED, classes=[1], ignore_index=255)(logits, index, features)
    assert all(gradient.isfinite().all() for gradient in gradients(loss, logits, features))


def test_everything_ignored_gives_0_and_gradients_of_0():
    logits, index, features = batch()
    index[:] = 255
    loss = CombinedExudateLoss(**FIXED, classes=[1], ignore_index=255)(logits, index, features)
    assert loss == 0
    assert all(not gradient.any() for gradient in gradients(loss, logits, features))


def test_the_cross_entropy_of_one_valid_pixel_is_its_own():
    logits, index, features = batch()
    index[:] = 255
    index[0, 3, 5] = 2
    terms = CombinedExudateLoss(**FIXED, classes=[1], ignore_index=255).terms(logits, index, features)
    torch.testing.assert_close(terms.supervised, -logits[0, :, 3, 5].log_softmax(0)[2])


LOSSES = {
    "smp Dice": (smp.losses.DiceLoss("multiclass", from_logits=True), torch.int64, False),
    "smp Focal": (smp.losses.FocalLoss("multiclass"), torch.int64, False),
    "MONAI DiceCE": (monai.losses.DiceCELoss(to_onehot_y=True, softmax=True), torch.uint8, True),
    "torch, weighted": (nn.CrossEntropyLoss(weight=torch.ones(5)), torch.int64, False),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_other_packages_work_untouched(name):
    supervised, dtype, axis = LOSSES[name]
    logits, index, features = batch(dtype=dtype)
    target = index.unsqueeze(1) if axis else index
    terms = CombinedExudateLoss(**FIXED, supervised=supervised, classes=range(1, 5)).terms(logits, target, features)
    torch.testing.assert_close(terms.supervised, supervised(logits, target))
    assert terms.edge > 0


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda x, t, f: (x[:, :4], t, f), ValueError, r"classes must be below .* channels, 4, got \(1, 2, 3, 4\)"),
        (lambda x, t, f: (x, t + 2, f), ValueError, "from 0 to 4, one for each channel of logits, got 5; give the net"),
        (lambda x, t, f: (torch.cat([x, x[:, :1]], 1), t + 3, f), ValueError, "from 0 to 5, .* got 6; give the net"),
        (lambda x, t, f: (x, (t > 1).byte() * 255, f), ValueError, r"got 255; .* into \(target > 127\).long\(\)"),
        (lambda x, t, f: (x, t * 80, f), ValueError, r"a grey mask, .* into \(target > 127\).long\(\)"),
        (
            lambda x, t, f: (x, t.float(), f),
            TypeError,
            r"integer index mask.*got torch.float32; give target.long\(\) if it holds whole numbers$",
        ),
        (lambda x, t, f: (x, lesion_masks(t, range(1, 5)), f), ValueError, "must be an index mask.*leave classes out"),
        (lambda x, t, f: (x, t.bool(), f), TypeError, r"got torch.bool; give target.long\(\)$"),
        (lambda x, t, f: (x, t[..., None], f), ValueError, r"target.squeeze\(3\)"),
        (lambda x, t, f: (x, t[0], f), ValueError, r"target\[None\]"),
        (lambda x, t, f: (x, t[0, 0], f), ValueError, "give the class of each pixel"),
        (lambda x, t, f: (x, t + torch.arange(5, 5 + t.shape[2]), f), ValueError, "got 5, 6, 7, 8, 9; "),
        (lambda x, t, f: (x, t.numpy(), f), TypeError, "got ndarray; make it one with torch.as_tensor"),
        (lambda x, t, f: (x[:, :, :16], t, f), ValueError, "resize logits with"),
    ],
)
def test_what_is_no_index_mask_is_refused(change, error, text):
    with pytest.raises(error, match=text):
        CombinedExudateLoss(**FIXED, classes=range(1, 5))(*change(*batch()))


@pytest.mark.parametrize(
    ("classes", "error", "text"),
    [
        ((), ValueError, "distinct integers >= 0"),
        ([1, 1], ValueError, "distinct integers >= 0"),
        ([-1], ValueError, "distinct integers >= 0"),
        ([1.0], TypeError, "for regions of several classes give masks"),
        ([(1, 2), 3], TypeError, "for regions of several classes give masks"),
        (3, TypeError, "such as range"),
        ("12", TypeError, "such as range"),
        ([1, 255], ValueError, "must not hold ignore_index = 255"),
    ],
)
def test_bad_classes_are_refused(classes, error, text):
    with pytest.raises(error, match=text):
        CombinedExudateLoss(classes=classes, ignore_index=255)
    with pytest.raises(error, match=text):
        lesion_masks(torch.zeros(1, 2, 2, dtype=torch.int64), classes, ignore_index=255)


def test_with_classes_the_parts_have_the_criterions_ignore_index():
    with pytest.raises(ValueError, match="edge must have ignore_index=None like the criterion, got 255"):
        CombinedExudateLoss(classes=[1], edge=PatchEdgeContrastLoss(ignore_index=255))


def test_an_index_mask_without_classes_is_recognised():
    logits, index, features = batch(classes=4)
    for target, number in ((index, "number of classes"), (index.unsqueeze(1), "4")):
        with pytest.raises(ValueError, match=rf"classes=range\(1, {number}\)"):
            CombinedExudateLoss(**FIXED)(logits, target, features)
    with pytest.raises(ValueError, match=r"classes=range\(1, 4\)"):
        CombinedExudateLoss(**FIXED)(logits[:, :1], index.unsqueeze(1), features)


def test_an_error_of_a_given_loss_says_what_it_was_given():
    logits, index, features = batch(dtype=torch.int32)
    criterion = CombinedExudateLoss(**FIXED, supervised=nn.CrossEntropyLoss(), classes=[1])
    with pytest.raises(RuntimeError, match=r"torch.int32; torch.nn.CrossEntropyLoss and .* want the index mask as"):
        criterion(logits, index, features)
    criterion = CombinedExudateLoss(**FIXED, supervised=nn.BCEWithLogitsLoss())
    with pytest.raises(RuntimeError, match=r"torch.bool; .*give the criterion target.float\(\)"):
        criterion(logits[:, :1], (index == 1).unsqueeze(1), features)


@pytest.mark.parametrize("arguments", [(), (3, "text"), ("text", 3)], ids=str)
def test_such_an_error_keeps_its_arguments(arguments):
    def supervised(logits, target):
        raise ValueError(*arguments)

    logits, index, features = batch()
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - its text is what is looked at
        CombinedExudateLoss(**FIXED, supervised=supervised, classes=[1])(logits, index, features)
    if arguments[:1] == ("text",):
        text, *others = caught.value.args
        assert text.startswith("text\n(supervised was given logits")
        assert tuple(others) == arguments[1:]
    else:
        assert caught.value.args == arguments


def test_such_an_error_speaks_of_ignored_pixels_and_of_lists_where_there_are_any():
    logits, index, features = batch(ignored=255)
    losses = {"supervised": nn.CrossEntropyLoss(), "classes": [1], "ignore_index": 255}
    with pytest.raises(IndexError, match="ignored pixels hold 255, which the loss must be told too"):
        CombinedExudateLoss(**FIXED, **losses)(logits, index, features)
    with pytest.raises(
        TypeError, match=r"logits a list of 2, first \(2, 5, 32, 32\), torch.float32 .*DeepSupervisionLoss one"
    ):
        CombinedExudateLoss(**FIXED, **losses)([logits, logits[..., ::2]], index, features)


def test_meta_tensors_of_monai_may_be_index_masks():
    logits, index, features = batch()
    criterion = CombinedExudateLoss(**FIXED, classes=[1, 3])
    got = criterion(logits, MetaTensor(index), features)
    assert type(got) is torch.Tensor
    assert torch.equal(got, criterion(logits, index, features))


def levels(logits):
    return [nn.functional.avg_pool2d(logits, 2**n) for n in range(3)]


def weighed(logits, target):
    targets = target if isinstance(target, (list, tuple)) else [target[:, :, :: 2**n, :: 2**n] for n in range(3)]
    return sum(
        nn.functional.binary_cross_entropy_with_logits(a, b.float()) / 2**n
        for n, (a, b) in enumerate(zip(logits, targets, strict=True))
    )


@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize("several", [True, False])
def test_deep_supervision_goes_to_the_loss_as_it_is_and_the_terms_see_the_finest(kind, several):
    logits, index, features = batch(classes=1)
    target = (index > 0).unsqueeze(1).float()
    targets = kind(target[:, :, :: 2**n, :: 2**n] for n in range(3)) if several else target
    terms = CombinedExudateLoss(**FIXED, supervised=weighed).terms(kind(levels(logits)), targets, features)
    assert torch.equal(terms.supervised, weighed(levels(logits), targets))
    assert torch.equal(terms.edge, PatchEdgeContrastLoss()(features, target))


def test_monais_wrapper_of_deep_supervision_is_a_supervised_loss():
    logits, index, features = batch(dtype=torch.uint8)
    wrapper = monai.losses.DeepSupervisionLoss(monai.losses.DiceCELoss(to_onehot_y=True, softmax=True))
    criterion = CombinedExudateLoss(**FIXED, supervised=wrapper, classes=range(1, 5))
    target = index.unsqueeze(1)
    got = criterion.terms(levels(logits), target, features)
    torch.testing.assert_close(got.supervised, wrapper(levels(logits), target))


def test_a_criterion_inside_of_the_wrapper_says_where_it_belongs():
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 1, 1))
    criterion = CombinedExudateLoss(features=FeatureTap(net, "1"))
    target = (batch()[1] > 0).unsqueeze(1).float()
    with pytest.raises(RuntimeError, match="for deep supervision give the criterion the list of logits"):
        monai.losses.DeepSupervisionLoss(criterion)(levels(net(torch.rand(2, 3, 32, 32))), target)


def test_levels_from_the_coarsest_on_are_refused():
    logits, index, features = batch()
    criterion = CombinedExudateLoss(**FIXED, supervised=lambda levels, target: levels[0].sum(), classes=[1])
    with pytest.raises(
        ValueError, match=r"the finest first, got sizes \[\(16, 32\), \(32, 32\)\]; give logits\[::-1\]"
    ):
        criterion([logits[:, :, :16], logits], [index[:, :16], index], features)


def test_masks_of_single_images_in_a_list_are_told_from_levels():
    logits, index, features = batch(1)
    with pytest.raises(TypeError, match=r"got a list of 2 tensors; .*torch.stack\(target\)"):
        CombinedExudateLoss(**FIXED)(logits, list((index == 1).unsqueeze(1)), features)


def test_deep_supervision_needs_a_loss():
    logits, index, features = batch(classes=1)
    with pytest.raises(ValueError, match="supervised must be given if logits are the levels"):
        CombinedExudateLoss(**FIXED)(levels(logits), (index > 0).unsqueeze(1), features)
    with pytest.raises(ValueError, match=r"make them a list with logits.unbind\(1\)"):
        CombinedExudateLoss(**FIXED)(logits[:, None], (index > 0).unsqueeze(1), features)


def test_a_models_other_outputs_are_no_levels():
    logits, index, features = batch(classes=1)
    said = (
        r"each \(B, K, h, w\), got a tuple of \(2, 1, 32, 32\), {}; if the model returns more than its logits, give the"
    )
    for output, text in (
        ((logits, logits.mean((2, 3))), said.format(r"\(2, 1\)")),
        ((logits, logits[None]), said.format(r"\(1, 2, 1, 32, 32\)")),
        ((logits, None), said.format("NoneType")),
        ((logits,), "got None; .* if the model returns more than its logits, give the logits alone"),
    ):
        with pytest.raises(ValueError, match=text):
            CombinedExudateLoss(**FIXED)(output, (index > 0).unsqueeze(1), features)


def test_the_watch_on_ignored_pixels_sees_the_finest_level():
    logits, index, features = batch(classes=1, ignored=-1)
    target = (index > 0).unsqueeze(1).float().masked_fill((index == -1).unsqueeze(1), -1)
    criterion = CombinedExudateLoss(**FIXED, supervised=lambda a, b: (a[0] * b).mean(), ignore_index=-1)
    with pytest.warns(UserWarning, match="a gradient at ignored pixels"):
        criterion(levels(logits), target, features).backward()


def test_a_tapped_model_of_several_levels_trains():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.coarse = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 1, 1), nn.Conv2d(6, 1, 1)

        def forward(self, images):
            features = self.body(images)
            return [self.head(features), self.coarse(nn.functional.avg_pool2d(features, 2))]

    net = Net()

    def supervised(logits, target):
        return weighed([*logits, nn.functional.avg_pool2d(logits[1], 2)], target)

    criterion = CombinedExudateLoss(supervised=supervised, features=FeatureTap(net))
    target = (batch()[1] > 0).unsqueeze(1).float()
    for _ in range(3):
        terms = criterion.terms(net(torch.rand(2, 3, 32, 32)), target)
        terms.total.backward()
    assert terms.beta > 0


@pytest.mark.parametrize(("channels", "classes"), [(1, [1]), (1, [1, 2]), (2, [2])])
def test_one_channel_for_one_class_is_told_to_take_a_mask(channels, classes):
    logits, index, features = batch()
    with pytest.raises(ValueError, match="classes must be below the number of logits' channels") as caught:
        CombinedExudateLoss(**FIXED, classes=classes)(logits[:, :channels], index, features)
    told = str(caught.value).partition("; or leave classes out and give the mask")[2]
    assert told == (" (target == 1), as (B, 1, H, W)" if channels == len(classes) == 1 else "")


@pytest.mark.parametrize("term", [PatchDensityContrastLoss, PatchEdgeContrastLoss])
@pytest.mark.parametrize("absent", [1, 3, 15])
def test_absent_classes_dilute_nothing(term, absent):
    _, index, features = batch()
    target = (index == 1).unsqueeze(1)
    more = torch.cat([target, torch.zeros_like(target).expand(-1, absent, -1, -1)], 1)
    one, many = term(4)(features, target), term(4)(features, more)
    assert one > 0
    assert torch.equal(one, many)
    assert torch.equal(*(gradients(loss, features)[0] for loss in (one, many)))


def test_absent_classes_dilute_nothing_in_compiled_code():
    _, index, features = batch()
    target = torch.stack([index == 1, index == 2, index == 3], 1)
    torch.compiler.reset()
    for term in (PatchDensityContrastLoss(8), PatchEdgeContrastLoss(8)):
        got = torch.compile(term, backend="aot_eager", fullgraph=True)(features, target)
        torch.testing.assert_close(got, term(features, target))


def test_where_no_class_is_shown_the_terms_are_0_and_attached():
    _, _, features = batch()
    for term in (PatchDensityContrastLoss(8), PatchEdgeContrastLoss(8)):
        loss = term(features, torch.zeros(2, 4, 32, 32))
        assert loss == 0
        assert not gradients(loss, features)[0].any()


def test_a_class_without_a_contrast_counts_for_nothing_though_it_is_shown():
    _, index, features = batch()
    whole = torch.stack([index == 1, torch.ones_like(index, dtype=torch.bool)], 1)
    wanted = reference.edge_loss(features.double(), whole[:, :1].double())
    torch.testing.assert_close(PatchEdgeContrastLoss()(features, whole).double(), wanted)


def test_two_patches_of_one_label_and_one_of_the_other_are_a_contrast():
    features = torch.randn(1, 4, 8, 24, generator=torch.Generator().manual_seed(0))
    target = torch.zeros(1, 2, 8, 24)
    target[:, 0, :, :8] = target[:, 1, :, 8:16] = 1
    term = PatchDensityContrastLoss(8)
    each = [term(features, target[:, k : k + 1]) for k in (0, 1)]
    assert min(each) > 0
    torch.testing.assert_close(term(features, target), sum(each) / 2)


def test_classes_that_are_not_shown_are_not_pooled(monkeypatch):
    from contrastive_exudate_loss import _terms

    pooled = []
    masked_sums = _terms.masked_sums
    monkeypatch.setattr(_terms, "masked_sums", lambda f, m, s: pooled.append(m.shape[1]) or masked_sums(f, m, s))
    _, index, features = batch()
    PatchEdgeContrastLoss()(features, lesion_masks(index, range(1, 150)))
    assert pooled == [4]  # an inner and an outer band of two classes
