"Networks by name: sizes, starting weights, mistakes"

import math

import pytest
import torch

from fixmatch_fastai.console import CommandError
from fixmatch_fastai.experiment.networks import make_network, set_bn_momentum, small_cnn, wide_resnet


@pytest.mark.parametrize('name, n', [('wrn_28_2', 1_467_610), ('wrn_28_8', 23_354_842)])
def test_wide_resnets_have_the_published_size(name, n):
    assert sum(p.numel() for p in make_network(name, 3, 10).parameters()) == n


def test_start_of_a_wide_resnet():
    torch.manual_seed(0)
    net = wide_resnet(28, 2)
    conv = net[8].conv2  # 64 to 64 channels
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.02)
    assert net[-1].weight.std().item() == pytest.approx(math.sqrt(2 / (128 + 10)), rel=0.1) and not net[-1].bias.any()
    assert net(torch.randn(2, 3, 32, 32)).std() < 5


def test_momentum_of_all_batchnorms():
    net = set_bn_momentum(small_cnn(1, 10), 0.05)
    assert {m.momentum for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.05}


@pytest.mark.parametrize(
    'name, pretrained, sentence',
    [
        ('resnet81', False, 'network resnet81 is not known: did you mean resnet'),
        ('wrn_27_2', False, '10, 16, 22, 28'),
        ('small_cnn', True, 'no pretrained weights of small_cnn'),
    ],
)
def test_mistakes_in_a_network(name, pretrained, sentence):
    with pytest.raises(CommandError, match=sentence):
        make_network(name, 1, 10, 8, pretrained)
