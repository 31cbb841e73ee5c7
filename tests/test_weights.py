"Weights go elsewhere and come back, whole or not at all, and without doing harm"

import json
import os
import pickle
import random
import struct
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from conftest import quiet_fit
from fastai.vision.all import ConvLayer, CrossEntropyLossFlat, DataLoaders, Learner, nn, set_seed
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fixmatch_fastai import __version__
from fixmatch_fastai.all import ModelEMA
from fixmatch_fastai.cli.weights import load_body
from fixmatch_fastai.console import CommandError

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
        text = f.metadata()
    assert len(text.pop('checksum')) == 32
    assert text == dict(format='pt', vocab=json.dumps([*'0123456789']), fixmatch_fastai=__version__)
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

    def half(self, data):
        self.write_text('half')
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(Path, 'write_bytes', half)
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


def not_finite(value):
    def change(v):
        v = v.clone()
        v.view(-1)[-1] = value
        return v

    return change


NUMBERS = {
    'NaN': (not_finite(float('nan')), 'not finite'),
    'inf': (not_finite(float('inf')), 'not finite'),
    'too large for float32': (lambda v: v.double() + 1e300, 'not finite'),
    'integers': (lambda v: v.long(), 'int64, not float32'),
    'bool': (lambda v: v.bool(), 'bool, not float32'),
    'complex': (lambda v: v + 1j, 'complex64, not float32'),
}


@pytest.mark.parametrize('change, why', NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize('strict', [True, False])
def test_weights_that_can_not_be_a_networks(tmp_path, change, why, strict):
    learn = build(tmp_path)
    file = learn.save_weights('w')
    tensors = load_file(file)
    save_file({**tensors, '3.weight': change(tensors['3.weight'])}, file)
    before = weights(learn)
    with pytest.raises(ValueError, match=rf"The weights in w\.safetensors can't be .*3\.weight: {why}"):
        learn.load_weights('w', strict=strict)
    same(weights(learn), before)


def test_weights_of_another_precision(tmp_path):
    learn = build(tmp_path)
    file = learn.save_weights('w')
    save_file({k: v.half() if v.is_floating_point() else v for k, v in load_file(file).items()}, file)
    before = weights(learn)
    build(tmp_path, seed=3).load_weights('w').model.load_state_dict(before)
    same(weights(learn.load_weights('w')), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('vocab', ['', '[]', 'null', '{', '"0123456789"', '[1, 2]', '{"a": 1}', '[' * 100_000])
def test_names_of_classes_that_are_empty_or_damaged(tmp_path, vocab):
    learn, other = build(tmp_path), build(tmp_path, seed=3)
    file, before = learn.save_weights('w'), weights(other)
    save_file(load_file(file), file, {'format': 'pt', 'vocab': vocab})
    with pytest.raises(ValueError, match=r'names of the classes in w\.safetensors are empty or damaged'):
        other.load_weights('w')
    same(weights(other), before)
    same(weights(other.load_weights('w', strict=False)), weights(learn))


def test_a_learner_without_classes(tmp_path):
    "Saves none, and loads what it saved"
    learn = build(tmp_path, vocab='')
    learn.load_weights(learn.save_weights('w'))


def test_no_weight_in_common(tmp_path):
    build(tmp_path).save_weights('w')
    other = build(tmp_path, net=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    with pytest.raises(ValueError, match=r'No weight in w\.safetensors has the name'):
        other.load_weights('w', strict=False)


def test_bytes_that_were_changed(tmp_path):
    "Each is refused in one sentence, or they tell nothing of the weights; the learner is never half loaded"
    learn, other = build(tmp_path), build(tmp_path, seed=3)
    file = learn.save_weights('w')
    good, before, rng = file.read_bytes(), weights(other), random.Random(0)
    refused = 0
    for _ in range(80):
        data = bytearray(good)
        for _ in range(rng.choice([1, 1, 4])):
            data[rng.choice([rng.randrange(len(data)), rng.randrange(8 + 700)])] = rng.randrange(256)
        file.write_bytes(data)
        try:
            other.load_weights('w')
        except ValueError as e:
            refused += 1
            assert '\n' not in str(e) and 'w.safetensors' in str(e)
            same(weights(other), before)
        else:
            same(weights(other), weights(learn))
        other.model.load_state_dict(before)
    assert refused > 20


def compile_whole(learn):
    learn.model = torch.compile(learn.model, backend='eager')


def compile_part(learn):
    learn.model[0] = torch.compile(learn.model[0], backend='eager')


@pytest.mark.parametrize('there', [None, compile_whole, compile_part])
@pytest.mark.parametrize('here', [None, compile_whole, compile_part])
@pytest.mark.parametrize('strict', [True, False])
def test_weights_of_compiled_networks(tmp_path, there, here, strict):
    "The file has the names of the plain network, and is loaded into any"
    a, b = build(tmp_path), build(tmp_path, seed=3)
    plain = weights(a)
    for learn, wrap in ((a, there), (b, here)):
        if wrap:
            wrap(learn)
    file = a.save_weights('w')
    assert load_file(file).keys() == plain.keys()
    save_file({f'_orig_mod.{k}': v for k, v in load_file(file).items()}, tmp_path / 'models/of_torch.safetensors')
    for name in ('w', 'of_torch'):
        b.model.load_state_dict({k: v * 0 for k, v in b.model.state_dict().items()})
        b.load_weights(name, strict=strict)
        same([*weights(b).values()], [*plain.values()])


def test_export_on_loaders_that_are_not_fastais(tmp_path):
    learn = build(tmp_path)
    images = torch.utils.data.TensorDataset(torch.randn(4, 1, 8, 8), torch.arange(4))
    torch_dl = torch.utils.data.DataLoader(images, batch_size=2)
    for dls in (learn.dls, DataLoaders(torch_dl, torch_dl)):
        learn.dls = dls
        with pytest.raises(TypeError, match='`export` needs .* use `learn.save_weights`, and `load_weights` in'):
            learn.export()
    assert not (tmp_path / 'export.pkl').exists()


@pytest.mark.parametrize('prefix', ['', 'module.', '_orig_mod.', '_orig_mod.module.'])
def test_weights_for_a_body(tmp_path, prefix):
    "Of the command line: of a wrapped network too; NaN is refused, and nothing is loaded"
    name, file = 'test_resnet', tmp_path / 'a.pth'
    torch.manual_seed(0)
    body, good = SimpleNamespace(model=timm.create_model(name)), timm.create_model(name).state_dict()
    body.state_dict = body.model.state_dict
    start = {k: v.clone() for k, v in body.state_dict().items()}
    bad = {**good, [*good][-1]: good[[*good][-1]] * float('nan')}
    torch.save({'state_dict': {prefix + k: v for k, v in bad.items()}}, file)
    with pytest.raises(CommandError, match="can't be a network's .*not finite"):
        load_body(body, name, file)
    same(dict(body.state_dict()), start)
    torch.save({'state_dict': {prefix + k: v for k, v in good.items()}}, file)
    load_body(body, name, file)
    same(dict(body.state_dict()), dict(good))
