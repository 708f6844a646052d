"""Laws of Pull where several processes train: one weight where they gather, and gradients travel as without it."""

import pytest
import torch
from processes import on_ranks
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from contrastive_exudate_loss import CombinedExudateLoss, PatchEdgeContrastLoss, Pull

STEPS = 4
WAYS = {
    "DistributedDataParallel": {},
    "unused parameters": {"find_unused_parameters": True},
    "static graph": {"static_graph": True},
    "small buckets": {"bucket_cap_mb": 0.0001},
}


class Net(nn.Module):
    """A body and a head; gives the features too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.head = nn.Conv2d(8, 1, 1)

    def forward(self, images):
        features = self.body(images)
        return self.head(features), features


def batch(rank, step):
    """Two images of a rank, with a blot each; every third batch of each rank, at another step, shows none."""
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(10 * step + rank))
    target = torch.zeros(2, 1, 32, 32)
    if (step + rank) % 3 != 1:
        target[:, :, 8 : 14 + rank, 10:20] = 1
    return images, target


def trained(rank, count, options, beta, gather, by_hand, sharded=False):
    """Weights used, gradients sent in each step, and the parameters at the end."""
    net, sent = Net(), []
    criterion = CombinedExudateLoss(beta=beta, edge=PatchEdgeContrastLoss(8, gather_distributed=gather))
    if not by_hand:
        criterion.tap = net
    if sharded:
        model = fully_shard(net, mesh=init_device_mesh("cpu", (count,)))
    else:
        model = DistributedDataParallel(net, **options)

        def counted(state, bucket):
            sent.append(bucket.buffer().numel())
            return allreduce_hook(state, bucket)

        if "static_graph" not in options:  # torch makes the buckets anew after the first step of one
            model.register_comm_hook(None, counted)
    optimizer, weights, before = torch.optim.SGD(model.parameters(), 0.1), [], 0
    for step in range(STEPS):
        images, target = batch(rank, step)
        optimizer.zero_grad()
        logits, features = model(images)
        terms = criterion.terms(logits, target, *([features] if by_hand else []))
        assert all(parameter.grad is None for parameter in net.parameters())
        assert len(sent) == before
        terms.total.backward()
        before = len(sent)
        optimizer.step()
        weights.append(terms.beta.reshape(()))
    parameters = [getattr(p, "full_tensor", p.detach)().detach() for p in net.parameters()]
    return torch.stack(weights), sent, parameters


def same_on_all(results):
    (_, sent, first), *others = results
    assert all(torch.equal(a, b) for _, _, other in others for a, b in zip(first, other, strict=True))
    assert all(theirs == sent for _, theirs, _ in others)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("by_hand", [False, True])
def test_processes_that_gather_use_one_weight_and_send_what_a_number_sends(way, by_hand, tmp_path):
    count = 3 if way == "DistributedDataParallel" else 2
    results = on_ranks(count, tmp_path, trained, WAYS[way], Pull(1.0), True, by_hand)
    same_on_all(results)
    weights = results[0][0]
    waits = by_hand and way == "static graph"  # for whose first backward pass a differentiation would be taken
    assert not weights[: 1 + waits].any()
    assert (weights[1 + waits :] > 0).all()
    assert all(torch.equal(theirs, weights) for theirs, *_ in results)
    assert results[0][1] == on_ranks(count, tmp_path, trained, WAYS[way], 0.1, True, by_hand)[0][1]


def test_processes_that_do_not_gather_use_the_weights_of_their_own_images(tmp_path):
    (first, *_), (second, *_) = results = on_ranks(2, tmp_path, trained, {}, Pull(1.0), False, False)
    same_on_all(results)
    assert first[2] > 0
    assert second[2] > 0
    assert first[2] != second[2]


@pytest.mark.parametrize("gather", [False, True])
def test_sharded_models_have_the_weights_of_replicated_ones(gather, tmp_path):
    replicated = on_ranks(2, tmp_path, trained, {}, Pull(1.0), gather, False)
    sharded = on_ranks(2, tmp_path, trained, {}, Pull(1.0), gather, False, True)
    for (wanted, *_), (got, *_) in zip(replicated, sharded, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=0)
