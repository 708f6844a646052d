"""Laws of many processes: together they give the loss and the gradients of one that holds the whole batch."""

import contextlib
import copy
import math
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from batches import TERMS, term
from interpreted import kernels_on
from processes import LIMIT, on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from contrastive_exudate_loss import (
    CombinedExudateLoss,
    FeatureTap,
    PatchDensityContrastLoss,
    PatchEdgeContrastLoss,
    _terms,
    fused,
)
from contrastive_exudate_loss.distributed import of_all_ranks, rank_and_count, sum_of_ranks

IMAGES = 6
# Images of each rank: equal shares, unequal ones.
SHARES = {2: [(3, 3), (1, 5)], 3: [(2, 2, 2), (3, 1, 2)]}
shares = pytest.mark.parametrize("share", [share for shared in SHARES.values() for share in shared], ids=str)
processes = pytest.mark.parametrize("count", SHARES)


def lesions(classes=1, size=32):
    """Six targets with different numbers of lesions; the fourth has none, the fifth is ignored."""
    noise = torch.rand(IMAGES, classes, size + 4, size + 4, generator=torch.Generator().manual_seed(0))
    target = (nn.functional.avg_pool2d(noise, 5, stride=1) > 0.5).double()
    target[0, :, : size // 2] = 1
    target[3], target[4] = 0, -1
    return target


def features_of(images, weight):
    return torch.einsum("bchw,cd->bdhw", images, weight)


def batch(classes=1, dtype=torch.float64):
    """Images, a weight that makes them features, and their targets."""
    images = torch.randn(IMAGES, 5, 16, 16, generator=torch.Generator().manual_seed(1), dtype=dtype)
    weight = torch.eye(5, 4, dtype=dtype).add_(0.1).requires_grad_()
    return images, weight, lesions(classes)


def part(share, rank):
    return slice(sum(share[:rank]), sum(share[: rank + 1]))


def averaged(gradient):
    """As DistributedDataParallel leaves it."""
    gradient = gradient.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(gradient)
    return gradient / dist.get_world_size()


OPTIONS = {
    "density": ("density", {"patch_size": 4, "threshold": 0.4}),
    "density, the best": ("density", {"patch_size": 4, "threshold": 0.4, "select": 3}),
    "density, sup_con": ("density", {"num_patches": 7, "threshold": 0.4, "contrast": "sup_con"}),
    "density, more patches allowed than there are": ("density", {"patch_size": 8, "max_patches": 10**4}),
    "edge": ("edge", {"patch_size": 8}),
    "edge, of images": ("edge", {"scope": "image", "isolate_patches": True, "contrast": "sup_con"}),
}


def gathered(rank, count, name, options, share, classes, shared):
    images, weight, target = batch(classes)
    _terms._shares_anchors = lambda _: shared
    own = part(share, rank)
    loss = TERMS[name](**options, ignore_index=-1, gather_distributed=True)(
        features_of(images[own], weight), target[own]
    )
    return loss.detach(), averaged(torch.autograd.grad(loss, weight)[0])


def in_one_process(name, options, classes):
    images, weight, target = batch(classes)
    loss = TERMS[name](**options, ignore_index=-1)(features_of(images, weight), target)
    return loss.detach(), torch.autograd.grad(loss, weight)[0]


def assert_all_equal(results, wanted):
    assert wanted[1].abs().max() > 1e-3  # or nothing would be compared
    for result in results:
        for got, value in zip(result, wanted, strict=True):
            torch.testing.assert_close(got, value, rtol=1e-9, atol=1e-12)


@shares
@pytest.mark.parametrize("case", OPTIONS)
def test_the_ranks_together_give_the_loss_and_gradients_of_the_whole_batch(share, case, tmp_path):
    name, options = OPTIONS[case]
    results = on_ranks(len(share), tmp_path, gathered, name, options, share, 1, False)
    assert_all_equal(results, in_one_process(name, options, 1))


def by_kernels(rank, count, function, calls, arguments):
    """What a function of the rank gives with the kernels, which are called so many times on each rank."""
    with kernels_on("cpu") as works:
        found = function(rank, count, *arguments)
    assert len(works) == calls
    return found


@pytest.mark.parametrize(
    "case", ["density, the best", "density, more patches allowed than there are", "edge, of images"]
)
def test_kernels_on_all_ranks_give_the_loss_and_gradients_of_the_whole_batch(case, tmp_path):
    name, options = OPTIONS[case]
    arguments = name, options, (1, 5), 1, False
    results = on_ranks(2, tmp_path, by_kernels, gathered, 1, arguments, limit=3 * LIMIT)
    assert_all_equal(results, in_one_process(name, options, 1))


def criterion_of_both(gathers, edge=None):
    options = {"patch_size": 8, "ignore_index": -1, "gather_distributed": gathers}
    return CombinedExudateLoss(
        0.3,
        0.7,
        density=PatchDensityContrastLoss(threshold=0.4, **options),
        edge=PatchEdgeContrastLoss(max_patches=10**4, **options | (edge or {})),
        ignore_index=-1,
    )


def both_together(rank, count, unable=None, edge=None):
    images, weight, target = batch()
    own = slice(3 * rank, 3 * rank + 3)
    size = 32 - 8 * rank
    features = features_of(images[own, :, : size // 2, : size // 2], weight)
    target = target[own, :, :size, :size]
    with contextlib.ExitStack() as stack:
        if rank == unable:
            stack.enter_context(mock.patch.object(fused, "kernels", return_value=None))
        logits = features.new_zeros(target.shape).requires_grad_()
        terms = criterion_of_both(True, edge).terms(logits, target, features)
    by_weight, by_logits = torch.autograd.grad(2 * terms.total + terms.edge, (weight, logits))
    valid = target != -1
    torch.testing.assert_close(by_logits, 2 * valid * (0.5 - target) / valid.sum())
    return terms.density.detach(), averaged(by_weight)


@pytest.mark.parametrize(("unable", "calls"), [(None, 1), (1, 0)])
def test_kernels_work_for_all_ranks_whatever_their_sizes_or_for_none(unable, calls, tmp_path):
    images, weight, target = batch()
    target[3:, :, 24:], target[3:, :, :, 24:] = -1, -1
    terms = criterion_of_both(False).terms(
        torch.zeros_like(target, requires_grad=True), target, features_of(images, weight)
    )
    wanted = terms.density.detach(), torch.autograd.grad(2 * terms.total + terms.edge, weight)[0]
    results = on_ranks(2, tmp_path, by_kernels, both_together, calls, (unable,), limit=3 * LIMIT)
    assert_all_equal(results, wanted)


@pytest.mark.parametrize("unable", [None, 0])
@pytest.mark.parametrize(
    "edge",
    [
        {
            "patch_size": None,
            "num_patches": 4,
        },  # patches of 8 pixels on the first rank, as density has, of 6 on the other
        {"gather_distributed": False},
    ],
)
def test_kernels_make_the_same_calls_on_all_ranks(edge, unable, tmp_path):
    wanted = on_ranks(2, tmp_path, both_together, None, edge)
    calls = 2 if unable is None else 0
    got = on_ranks(2, tmp_path, by_kernels, both_together, calls, (unable, edge), limit=3 * LIMIT)
    for one, other in zip(got, wanted, strict=True):
        assert_all_equal([one], other)


@shares
@term
@pytest.mark.parametrize("contrast", ["nt_xent", "sup_con"])
def test_so_they_do_where_they_share_out_the_anchors_as_on_cuda(share, term, contrast, tmp_path):
    options = {"patch_size": 4, "contrast": contrast}
    results = on_ranks(len(share), tmp_path, gathered, term, options, share, 2, True)
    assert_all_equal(results, in_one_process(term, options, 2))


@pytest.mark.parametrize(("device", "shared"), [("cpu", False), ("meta", True)])
def test_on_the_cpu_each_process_contrasts_the_whole(device, shared):
    assert _terms._shares_anchors(torch.empty(0, device=device)) == shared


def of_other_sizes(rank, count, name):
    images, weight, target = batch()
    size = 32 - 8 * rank
    own = slice(3 * rank, 3 * rank + 3)
    loss = TERMS[name](4, ignore_index=-1, gather_distributed=True)(
        features_of(images[own, :, : size // 2, : size // 2], weight), target[own, :, :size, :size]
    )
    return loss.detach(), averaged(torch.autograd.grad(loss, weight)[0])


@term
def test_ranks_may_hold_images_of_other_sizes(term, tmp_path):
    images, weight, target = batch()
    target[3:, :, 24:], target[3:, :, :, 24:] = -1, -1
    loss = TERMS[term](4, ignore_index=-1)(features_of(images, weight), target)
    wanted = loss.detach(), torch.autograd.grad(loss, weight)[0]
    assert_all_equal(on_ranks(2, tmp_path, of_other_sizes, term), wanted)


def without_lesions(rank, count, value):
    images, weight, target = batch()
    loss = sum(
        loss(4, ignore_index=-1, gather_distributed=True)(
            features_of(images, weight), torch.full_like(target, value[rank])
        )
        for loss in TERMS.values()
    )
    loss.backward()
    return loss.detach(), weight.grad


@processes
@pytest.mark.parametrize("value", [(0, 0, 0), (1, 1, 1), (-1, -1, -1), (0, 1, -1)], ids=str)
def test_ranks_without_lesion_without_background_or_all_ignored_get_finite_losses(count, value, tmp_path):
    for loss, gradient in on_ranks(count, tmp_path, without_lesions, value):
        assert loss.isfinite()
        assert gradient.isfinite().all()
        assert bool(loss > 0) == (0 in value[:count] and 1 in value[:count])


def drawn(rank, count):
    """Dense and sparse patches at right angles, hence a loss that tells their number."""
    target = torch.zeros(1, 1, 8, 8)
    target[:, :, :4] = 1
    features = torch.cat([target, 1 - target], 1)
    return PatchDensityContrastLoss(1, max_patches=3, temperature=1, gather_distributed=True)(features, target)


@processes
def test_each_rank_draws_its_own_patches(count, tmp_path):
    for loss in on_ranks(count, tmp_path, drawn):
        assert float(loss) == pytest.approx(math.log(1 + 3 * count / math.e), rel=1e-6)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(8, 1, 1),
        nn.Upsample(scale_factor=2),
    ).double()


def criterion(tap, gather):
    return CombinedExudateLoss(
        0.5,
        0.5,
        density=PatchDensityContrastLoss(4, gather_distributed=gather),
        edge=PatchEdgeContrastLoss(8, gather_distributed=gather),
        features=tap,
    )


def training_batch():
    generator = torch.Generator().manual_seed(2)
    return torch.rand(IMAGES, 3, 32, 32, generator=generator, dtype=torch.float64), lesions().clamp(min=0)


def trained(rank, count, way):
    """The parameters after some steps, each rank on its share."""
    net = network()
    tap = FeatureTap(net)
    loss_of = criterion(tap, gather=True)
    if way == "fully_shard":
        mesh = init_device_mesh("cpu", (count,))
        for layer in net:
            if isinstance(layer, nn.Conv2d):
                fully_shard(layer, mesh=mesh)
        model = fully_shard(net, mesh=mesh)
    else:
        model = DistributedDataParallel(net)
    if way == "compiled":
        loss_of = torch.compile(loss_of, backend="aot_eager")
    images, target = training_batch()
    own = slice(IMAGES // count * rank, IMAGES // count * (rank + 1))
    train(model, loss_of, images[own], target[own], accumulate=way == "accumulated")
    return [getattr(p, "full_tensor", p.detach)().detach() for p in net.parameters()]


def train(model, loss_of, images, target, accumulate=False):
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        if accumulate:
            with model.no_sync():
                loss_of(model(images.flip(3)), target.flip(3)).backward()
        loss_of(model(images), target).backward()
        optimizer.step()


@processes
@pytest.mark.parametrize("way", ["DistributedDataParallel", "accumulated", "compiled", "fully_shard"])
def test_training_on_many_processes_gives_the_weights_of_one(count, way, tmp_path):
    net = network()
    before = copy.deepcopy(list(net.parameters()))
    images, target = training_batch()
    loss_of = criterion(FeatureTap(net), gather=False)
    net.no_sync = torch.enable_grad  # what one process has nothing to do for
    train(net, loss_of, images, target, accumulate=way == "accumulated")
    assert all((new - old).abs().max() > 1e-6 for new, old in zip(net.parameters(), before, strict=True))
    for parameters in on_ranks(count, tmp_path, trained, way):
        torch.testing.assert_close(parameters, [p.detach() for p in net.parameters()], rtol=1e-9, atol=1e-12)


def validated(rank, count):
    net = network()
    loss_of = criterion(FeatureTap(net), gather=True)
    images, target = training_batch()
    if rank > 0:
        return torch.zeros(())
    net(images)  # the tap chooses its layer
    with torch.no_grad():
        return loss_of(net(images), target)


def test_without_gradients_one_rank_works_alone(tmp_path):
    net, (images, target) = network(), training_batch()
    wanted = criterion(FeatureTap(net), gather=False)(net(images), target)
    torch.testing.assert_close(on_ranks(2, tmp_path, validated)[0], wanted.detach())


def by_itself(rank, count, name):
    images, weight, target = batch()
    own = part((3, 3), rank)
    return TERMS[name](4, ignore_index=-1)(features_of(images[own], weight), target[own]).detach()


@term
def test_without_the_option_each_rank_contrasts_its_own(term, tmp_path):
    images, weight, target = batch()
    for rank, got in enumerate(on_ranks(2, tmp_path, by_itself, term)):
        own = part((3, 3), rank)
        assert torch.equal(got, TERMS[term](4, ignore_index=-1)(features_of(images[own], weight), target[own]).detach())


def one_rank(rank, count):
    loss, gradient = gathered(0, 1, "density", {"patch_size": 4}, (IMAGES,), 1, False)
    return loss, gradient


def test_one_process_gives_the_same_with_a_group_and_without_one(tmp_path):
    wanted = in_one_process("density", {"patch_size": 4}, 1)
    assert_all_equal(on_ranks(1, tmp_path, one_rank), wanted)
    images, weight, target = batch()
    for loss in TERMS.values():
        values = [
            loss(4, ignore_index=-1, gather_distributed=flag)(features_of(images, weight), target)
            for flag in (False, True)
        ]
        assert torch.equal(*values)


def disagreeing(rank, count, features, classes):
    shape, dtype = features[rank]
    try:
        PatchDensityContrastLoss(4, gather_distributed=True)(
            torch.rand(2, shape, 8, 8, dtype=dtype), torch.zeros(2, classes[rank], 8, 8)
        )
    except ValueError as error:
        return str(error)
    return "nothing was said"


@pytest.mark.parametrize(
    ("features", "classes", "said"),
    [
        ([(3, torch.float32), (4, torch.float32)], (1, 1), "channels of features by rank: 3, 4"),
        ([(3, torch.float32), (3, torch.float64)], (1, 1), "bytes per value of features by rank: 4, 8"),
        ([(3, torch.float32), (3, torch.float16)], (1, 2), "classes of target by rank: 1, 2"),
    ],
)
def test_what_ranks_disagree_on_is_said_on_all(features, classes, said, tmp_path):
    wanted = f"features and target must agree on all processes with gather_distributed=True, got {said}"
    assert on_ranks(2, tmp_path, disagreeing, features, classes) == [wanted, wanted]


@pytest.fixture
def _group_of_one(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_group_of_one")
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_one_rank_gathers_and_sums_what_it_has(rows):
    vectors = torch.randn(rows, 3, requires_grad=True)
    labels, order = torch.rand(rows) > 0.5, torch.rand(rows, dtype=torch.float64)
    got, *columns = of_all_ranks(vectors, labels, order, classes=1)
    total = sum_of_ranks((got**3).sum())
    assert torch.equal(total, (vectors**3).sum())
    torch.testing.assert_close(torch.autograd.grad(total, vectors)[0], 3 * vectors**2)
    assert torch.equal(columns[0], labels)
    assert torch.equal(columns[1], order)


def test_without_a_group_there_is_one_process():
    assert rank_and_count() == (0, 1)


@pytest.mark.usefixtures("_group_of_one")
@pytest.mark.parametrize("talk", [lambda x: of_all_ranks(x, classes=1)[0].sum(), lambda x: sum_of_ranks(x.sum())])
def test_what_ranks_say_to_each_other_is_in_no_graph(talk):
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
        torch.compile(talk, backend="eager", fullgraph=True)(torch.ones(3, 2))


def sent(rank, count, shared, ignored=False):
    """Bytes that each rank sends in a step, were the group's collectives rings."""
    collectives, total = {name: getattr(dist, name) for name in ("all_gather", "all_reduce")}, []
    ring = {"all_gather": count - 1, "all_reduce": 2 * (count - 1) / count}

    def counting(name):
        def call(*tensors):
            total.append(ring[name] * tensors[-1].nbytes)
            return collectives[name](*tensors)

        return call

    images, weight, target = batch(dtype=torch.float32)
    if ignored:
        target = torch.full_like(target, -1)
    own = part((3, 1, 2)[:count], rank)
    _terms._shares_anchors = lambda _: shared
    dist.all_gather, dist.all_reduce = map(counting, collectives)
    features = features_of(images[own], weight)
    PatchDensityContrastLoss(8, ignore_index=-1, gather_distributed=True)(features, target[own]).backward()
    return sum(total)


@processes
@pytest.mark.parametrize("shared", [False, True])
def test_the_traffic_is_what_the_documents_say(count, shared, tmp_path):
    document = Path(__file__).parents[1] / "docs/many-processes.md"
    (code,) = re.findall(r"```python\n(def bytes_sent.*?)```", document.read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    small = 32 * (count - 1) + shared * 2 * 2 * 4 * (count - 1) / count  # sizes, and where anchors are shared the loss
    patches = 3 * (32 // 8) ** 2
    for total in on_ranks(count, tmp_path, sent, shared):
        assert total == pytest.approx(names["bytes_sent"](count, patches, channels=4) + small)
    for total in on_ranks(count, tmp_path, sent, shared, True):  # a row of nothing: some backends refuse no rows
        assert total == pytest.approx(names["bytes_sent"](count, 1, channels=4) + small)
