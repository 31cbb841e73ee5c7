"What a step is made of, as functions of tensors"

import numpy as np
import pytest
import torch
from conftest import tiny_net
from fastai.vision.all import nn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from two_processes import Replicas

from fixmatch_fastai.batch import interleaved, kept_rows, tells_truth, unpack

leaf = st.sampled_from(
    [None, 0, 'text', {}, *(torch.zeros(o) for o in [(), 2, (2, 3, 4, 4), (3, 3, 4, 4), (2, 3, 4, 5)])]
)
shapes = st.recursive(leaf, lambda o: st.lists(o, max_size=4) | st.lists(o, max_size=4).map(tuple), max_leaves=6)


@settings(deadline=None, max_examples=300, derandomize=True, suppress_health_check=list(HealthCheck))
@given(shapes)
def test_unpack_understands_or_refuses_anything(batch):
    "A batch of any shape is understood, or refused in a sentence"
    try:
        weak, strong, y, idxs = unpack(batch)
    except (TypeError, ValueError) as e:
        assert str(e).endswith('.') and len(str(e)) < 500
    else:
        assert weak.shape == strong.shape and weak.ndim > 2


@pytest.mark.parametrize('y', [3, np.int64(3), torch.tensor(3)], ids=['int', 'numpy', 'tensor'])
@pytest.mark.parametrize('pair', [tuple, list])
def test_truth_of_a_torch_data_set_is_found(pair, y):
    loader = lambda y: torch.utils.data.DataLoader([(pair(torch.zeros(2, 1, 4, 4)), y)])
    assert tells_truth(loader(y)) and not tells_truth(loader(-1 * y)), 'below 0 it is unknown'


@pytest.mark.parametrize(
    'weights,expected',
    [
        ([0, 1, 0, 0.5, 0, 0, 0, 0], [1, 3]),
        ([0] * 8, []),
        ([1] * 8, range(8)),
        ([0] * 16 + [1], [16, 0, 1]),
        ([1], [0]),
        ([[0, 0], [0, 0.1], [0, 0]], [1]),
    ],
)
def test_kept_rows(weights, expected):
    assert kept_rows(torch.tensor(weights, dtype=torch.float32)).tolist() == list(expected)


def test_kept_rows_have_few_sizes():
    "However many count, there are nine sizes at most: as many compiled graphs"
    sizes = {len(kept_rows((torch.arange(448) < n).float())) for n in range(449)}
    assert sizes == {56 * i for i in range(9)}


@pytest.mark.parametrize('n', [2, 3])
def test_each_replica_sees_all_kinds_of_images(n):
    "Labelled, weak and strong ones"
    kinds = torch.tensor([0] * 4 + [1] * 8 + [2] * 8)
    order = interleaved(20, Replicas(tiny_net(), n))
    assert all(len(set(o.tolist())) == 3 for o in kinds[order].chunk(n))


def test_rows_are_interleaved_for_replicas_alone():
    assert interleaved(12, tiny_net()) is None and interleaved(12, nn.DataParallel(tiny_net())) is None
    assert interleaved(7, Replicas(tiny_net(), 3)).tolist() == [0, 3, 6, 1, 4, 2, 5]
