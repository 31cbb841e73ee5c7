"Weights go elsewhere and come back, whole or not at all, and without doing harm"

import json
import os
import pickle
import struct
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import quiet_fit
from fastai.vision.all import ConvLayer, CrossEntropyLossFlat, DataLoaders, Learner, nn, set_seed
from safetensors import safe_open
from safetensors.torch import save_file

from fixmatch_fastai import __version__
from fixmatch_fastai.all import ModelEMA

same = partial(torch.testing.assert_close, rtol=0, atol=0)


class Evil:
    def __reduce__(self):
        return os.mkdir, ('harm-was-done',)


def net(n_out=10):
    return nn.Sequential(ConvLayer(1, 4, stride=2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, n_out))


def build(path, seed=1, net=net, vocab='0123456789', cbs=()):
    "A learner on noise: weights are all that counts here"
    set_seed(seed)
    dl = [(torch.randn(4, 1, 8, 8), torch.arange(4))] * 2
    dls = DataLoaders(dl, dl)
    dls.vocab = [*vocab]
    return Learner(dls, net(), CrossEntropyLossFlat(), path=path, cbs=[*cbs])


def weights(learn):
    return {n: v.clone() for n, v in learn.model.state_dict().items()}


def test_weights_there_and_back(tmp_path):
    learn, other = build(tmp_path, cbs=[ModelEMA(half_life=3)]), build(tmp_path, seed=3)
    quiet_fit(learn, 1)
    file = learn.save_weights('w')
    assert file == tmp_path / 'models/w.safetensors' and [o.name for o in file.parent.iterdir()] == ['w.safetensors']
    assert other.load_weights(file) is other
    same(weights(other), weights(learn))
    same(weights(learn), dict(learn.model_ema.ema.module.state_dict()))  # the average is what was saved
    with safe_open(file, 'pt') as f:
        assert f.metadata() == dict(format='pt', vocab=json.dumps([*'0123456789']), fixmatch_fastai=__version__)
    other.load_weights('w.safetensors')
    assert learn.save_weights(tmp_path / 'x.safetensors') == tmp_path / 'x.safetensors'


def test_training_goes_on_from_loaded_weights(tmp_path):
    "The average of before is forgotten"
    learn, other = build(tmp_path), build(tmp_path, seed=3, cbs=[ModelEMA(half_life=1000)])
    file = learn.save_weights('w')
    quiet_fit(other, 1)
    other.load_weights(file)
    loaded = weights(other)
    quiet_fit(other, 1, 0.0, wd=0.0)
    same(
        {n: v for n, v in weights(other).items() if 'running' not in n and 'num_b' not in n},
        {n: v for n, v in loaded.items() if n in dict(other.model.named_parameters())},
    )


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(1, 4, 3), nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        flat = torch.randn(20)
        self.register_buffer('one', flat[:8])
        self.register_buffer('two', flat[8:])
        self.register_buffer('none', torch.zeros(0))
        self.register_buffer('none2', torch.zeros(0))
        self.register_buffer('wide', torch.ones(1).expand(3))

    def forward(self, x):
        return self.b(self.a(self.conv(x).mean((2, 3))))


def test_tied_shared_and_scattered_tensors(tmp_path):
    a, b = (build(tmp_path, net=Tied, seed=s) for s in (1, 2))
    for m in (a.model, b.model):
        m.to(memory_format=torch.channels_last)
    a.save_weights('w')
    del b.model.wide  # a buffer with one number for three can't be written to
    b.model.register_buffer('wide', torch.zeros(3))
    b.load_weights('w')
    same(weights(b), weights(a))
    assert b.model.a.weight is b.model.b.weight
    assert b.model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    state = {n: v.contiguous().clone() for n, v in a.model.state_dict().items() if n != 'a.weight'}
    save_file(state, tmp_path / 'models/other_name.safetensors')  # as another tool may name them
    b.model.a.weight.data.zero_()
    b.load_weights('other_name')
    same(b.model.a.weight, a.model.a.weight)


@pytest.mark.parametrize(
    'other, match',
    [
        (lambda: net(9), r'2 differ, such as 3\.weight\): make the learner with the same network'),
        (lambda: nn.Sequential(*net(), nn.ReLU(), nn.Linear(10, 10)), r'2 differ, such as 5\.weight'),
        (lambda: net()[:3], r'2 differ, such as 3\.'),
    ],
)
def test_weights_of_another_architecture(tmp_path, other, match):
    build(tmp_path).save_weights('w')
    learn = build(tmp_path, net=other, seed=3)
    before = weights(learn)
    with pytest.raises(ValueError, match=match):
        learn.load_weights('w')
    same(weights(learn), before)


def test_weights_of_other_classes(tmp_path):
    a, b = build(tmp_path), build(tmp_path, vocab=[*'1023456789'], seed=3)
    file, before = a.save_weights('w'), weights(b)
    with pytest.raises(ValueError, match=r"tell other classes apart, \['0', '1'.* and not \['1', '0'"):
        b.load_weights(file)
    same(weights(b), before)
    b.load_weights(file, strict=False)
    same(weights(b), weights(a))


def test_a_part_of_the_weights(tmp_path):
    another_head = lambda: nn.Sequential(*net()[:3], nn.ReLU(), nn.Linear(16, 10))
    a, b = build(tmp_path), build(tmp_path, seed=3, net=another_head)
    b.load_weights(a.save_weights('w'), strict=False)
    same(b.model[0].state_dict(), a.model[0].state_dict())
    c = build(tmp_path, seed=3, net=lambda: net(9))
    with pytest.raises(ValueError, match='1 differ|2 differ'):
        c.load_weights('w', strict=False)


DAMAGES = {
    'cut short': lambda b: b[:-10],
    'cut in its header': lambda b: b[:20],
    'empty': lambda b: b'',
    'a huge header': lambda b: struct.pack('<Q', 2**62) + b[8:],
    'a program': lambda b: pickle.dumps(Evil()),
}


@pytest.mark.parametrize('damage', DAMAGES.values(), ids=DAMAGES)
def test_damaged_weights(tmp_path, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    learn = build(tmp_path)
    file = learn.save_weights('w')
    file.write_bytes(damage(file.read_bytes()))
    before = weights(learn)
    with pytest.raises(ValueError, match="The file w.safetensors can't be read as safetensors"):
        learn.load_weights('w')
    same(weights(learn), before)
    assert not Path('harm-was-done').exists()
    with pytest.raises(FileNotFoundError, match='missing'):
        learn.load_weights('missing')


def test_weights_that_can_not_be_written_leave_those_before(tmp_path, monkeypatch):
    learn = build(tmp_path)
    file = learn.save_weights('w')
    before = file.read_bytes()

    def half(tensors, tmp, metadata):
        Path(tmp).write_bytes(b'half')
        raise KeyboardInterrupt

    monkeypatch.setattr('fixmatch_fastai.weights.save_file', half)
    with pytest.raises(KeyboardInterrupt):
        learn.save_weights('w')
    assert file.read_bytes() == before and [o.name for o in file.parent.iterdir()] == ['w.safetensors']


def test_weights_can_be_read_by_those_who_read_other_files(tmp_path):
    (tmp_path / 'other').write_bytes(b'')
    file = build(tmp_path).save_weights(tmp_path / 'weights.safetensors')
    assert file.stat().st_mode == (tmp_path / 'other').stat().st_mode


def test_only_the_first_process_writes_weights(tmp_path, monkeypatch):
    monkeypatch.setenv('RANK', '1')
    file = build(tmp_path).save_weights('w')
    assert file == tmp_path / 'models/w.safetensors' and not file.exists()
