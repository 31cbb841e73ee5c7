"The paper's optimiser against a loop by hand, its schedule against the formula, both beside fastai's own"

import math
import pickle
import warnings
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import no_bn, quiet_fit, tiny_net
from fastai.vision.all import (
    SGD,
    Callback,
    CancelStepException,
    CrossEntropyLossFlat,
    DataLoaders,
    GradientAccumulation,
    GradientClip,
    Learner,
    MixedPrecision,
    ParamScheduler,
    SaveModelCallback,
    load_learner,
    nn,
    params,
    set_seed,
)

from fixmatch_fastai.recipe import SchedPartCos, nesterov_sgd


def batches(n=4, bs=4):
    set_seed(1)
    return [(torch.randn(bs, 1, 16, 16), torch.randint(0, 10, (bs,))) for _ in range(n)]


def two_groups(model):
    return [params(model[0]), params(model[1:])]


def learner(tmp_path=None, data=None, net=tiny_net, **kwargs):
    data = data or batches()
    set_seed(0)
    kwargs = {'opt_func': nesterov_sgd, 'path': tmp_path, **kwargs}
    return Learner(DataLoaders(data, data), net(), CrossEntropyLossFlat(), **kwargs)


def kernel(name, p):
    return p.ndim > 1


def by_hand(model, data, lrs, wd=5e-4, mom=0.9, decays=kernel, rates=lambda name: 1.0):
    "SGD with Nesterov momentum and L2, written out: no optimizer of torch"
    bufs = {}
    model.train()
    for (x, y), lr in zip(data, lrs, strict=True):
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(named.values()))
        with torch.no_grad():
            for (n, p), g in zip(named.items(), grads):
                if decays(n, p):
                    g = g + wd * p
                bufs[n] = mom * bufs[n] + g if n in bufs else g.clone()
                p -= lr * rates(n) * (g + mom * bufs[n])


def equal(a, b):
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    assert a.keys() == b.keys()
    for n in a:
        assert a[n].shape == b[n].shape
        torch.testing.assert_close(a[n], b[n], rtol=1e-5, atol=1e-6, msg=lambda m, n=n: f'{n}: {m}')


# the optimiser


@pytest.mark.parametrize('net', [tiny_net, no_bn], ids=['BatchNorm', 'no norm'])
@pytest.mark.parametrize('wd', [0.0, 5e-4, 0.3])
def test_sgd_equals_loop_by_hand(net, wd):
    data = batches()
    learn = learner(data=data, net=net, opt_func=partial(nesterov_sgd, wd=wd))
    theirs = deepcopy(learn.model)
    quiet_fit(learn, 2, 0.03)
    by_hand(theirs, data * 2, [0.03] * 8, wd=wd)
    equal(learn.model, theirs)


def test_equals_torch_with_two_groups():
    "And is not the same as decaying everything"
    data = batches()
    learn = learner(data=data, opt_func=partial(nesterov_sgd, wd=0.1))
    with_all = learner(data=data, opt_func=partial(nesterov_sgd, wd=0.1), wd_bn_bias=True)
    theirs = deepcopy(learn.model)
    names = ['0.0.weight', '3.weight']
    named = dict(theirs.named_parameters())
    assert set(named) == {'0.0.weight', '0.1.weight', '0.1.bias', '3.weight', '3.bias'}
    decayed, others = [named.pop(n) for n in names], list(named.values())
    opt = torch.optim.SGD(
        [dict(params=decayed, weight_decay=0.1), dict(params=others)], 0.03, momentum=0.9, nesterov=True
    )
    theirs.train()
    for x, y in data:
        opt.zero_grad()
        F.cross_entropy(theirs(x), y).backward()
        opt.step()
    quiet_fit(learn, 1, 0.03)
    equal(learn.model, theirs)
    start = deepcopy(with_all.model)
    quiet_fit(with_all, 1, 0.03)
    by_hand(start, data, [0.03] * 4, wd=0.1, decays=lambda n, p: True)
    equal(with_all.model, start)
    with pytest.raises(AssertionError):
        equal(with_all.model, theirs)


def test_defaults_are_the_papers():
    opt = nesterov_sgd(list(tiny_net().parameters()))
    (hypers,) = opt.hypers
    assert (hypers['lr'], hypers['mom'], hypers['wd'], hypers['nesterov']) == (0.03, 0.9, 5e-4, True)


@pytest.mark.parametrize('mom', [0, 1, -0.5, float('nan')])
def test_momentum_refused(mom):
    with pytest.raises(ValueError, match='above 0 and below 1'):
        nesterov_sgd(no_bn().parameters(), mom=mom)


def groups_in_steps(learn):
    "Of each step to come, for each group of torch's optimizer: how many parameters, with which weight decay"
    learn.create_opt()
    seen, of_group = [], lambda g: (len(g['params']), g['weight_decay'])
    learn.opt.opt.register_step_pre_hook(lambda opt, *_: seen.append(list(map(of_group, opt.param_groups))))
    return seen


def test_no_empty_groups():
    learn = learner(wd_bn_bias=True)
    seen = groups_in_steps(learn)
    quiet_fit(learn, 1)
    assert seen == [[(5, 5e-4)]] * 4


def test_groups_stay_as_they_are():
    learn = learner(splitter=two_groups)
    seen = groups_in_steps(learn)
    groups = learn.opt.opt.param_groups
    inner = [list(map(id, o['params'])) for o in groups]
    quiet_fit(learn, 1)
    assert seen == [[(1, 5e-4), (2, 0.0), (1, 5e-4), (1, 0.0)]] * 4
    assert learn.opt.opt.param_groups is groups and [list(map(id, o['params'])) for o in groups] == inner
    assert [h['wd'] for h in learn.opt.hypers] == [5e-4] * 2


@pytest.mark.parametrize('exc', [KeyboardInterrupt, RuntimeError])
def test_groups_are_back_after_an_interrupt(exc):
    learn = learner(splitter=two_groups)
    learn.create_opt()

    def stop(*args):
        raise exc('stop')

    hook = learn.opt.opt.register_step_pre_hook(stop)
    with pytest.raises(exc):
        quiet_fit(learn, 1)
    assert [len(o) for o in learn.opt.param_lists] == [3, 2] and learn.opt.hypers[0]['wd'] == 5e-4
    hook.remove()
    quiet_fit(learn, 1)


def test_slice_of_rates():
    data = batches()
    learn = learner(data=data, splitter=two_groups, opt_func=partial(nesterov_sgd, wd=0.1))
    theirs = deepcopy(learn.model)
    quiet_fit(learn, 1, slice(0.01, 0.1))
    by_hand(theirs, data, [1.0] * 4, wd=0.1, rates=lambda n: 0.01 if n.startswith('0.') else 0.1)
    equal(learn.model, theirs)


def test_freeze_and_unfreeze():
    data = batches()
    learn = learner(data=data, splitter=two_groups, opt_func=partial(nesterov_sgd, wd=0.1), train_bn=False)
    start = deepcopy(learn.model)
    learn.freeze()
    quiet_fit(learn, 1, 0.03)
    for n, p in learn.model.named_parameters():
        assert torch.equal(p, start.get_parameter(n)) == n.startswith('0.'), n
    for p in start[0].parameters():
        p.requires_grad_(False)
    by_hand(start, data, [0.03] * 4, wd=0.1)
    equal(learn.model, start)
    learn.unfreeze()
    quiet_fit(learn, 1, 0.03)
    assert not any(torch.equal(p, q) for p, q in zip(learn.model.parameters(), start.parameters()))


def test_frozen_batchnorm_trains_on():
    "fastai trains BatchNorm in frozen layers (`train_bn=True`): no decay there either"
    learn = learner(splitter=two_groups, opt_func=partial(nesterov_sgd, wd=0.1))
    start = deepcopy(learn.model)
    learn.freeze()
    quiet_fit(learn, 1, 0.03)
    moved = {n for n, p in learn.model.named_parameters() if not torch.equal(p, start.get_parameter(n))}
    assert moved == {'0.1.weight', '0.1.bias', '3.weight', '3.bias'}


def test_wd_of_fit_and_of_the_learner():
    data = batches()
    for kwargs, wd in (({'wd': 0.2}, 0.2), ({}, 0.1)):
        learn = learner(data=data, wd=0.1)
        theirs = deepcopy(learn.model)
        quiet_fit(learn, 1, 0.03, **kwargs)
        by_hand(theirs, data, [0.03] * 4, wd=wd)
        equal(learn.model, theirs)


def test_sgd_with_one_cycle():
    data = batches()
    learn = learner(data=data)
    theirs, seen = deepcopy(learn.model), []

    class Look(Callback):
        order = 70

        def before_batch(self):
            if self.training:
                g = self.learn.opt.opt.param_groups[0]
                seen.append((g['lr'], g['momentum']))

    quiet_fit(learn, 2, 0.1, method='fit_one_cycle', cbs=Look())
    assert len(seen) == 8 and len({lr for lr, _ in seen}) > 4 and len({m for _, m in seen}) > 4
    bufs = {}
    theirs.train()
    for (x, y), (lr, mom) in zip(data * 2, seen):
        grads = torch.autograd.grad(F.cross_entropy(theirs(x), y), list(theirs.parameters()))
        with torch.no_grad():
            for (n, p), g in zip(theirs.named_parameters(), grads):
                g = g + 5e-4 * p if p.ndim > 1 else g
                bufs[n] = mom * bufs[n] + g if n in bufs else g.clone()
                p -= lr * (g + mom * bufs[n])
    equal(learn.model, theirs)


def test_sgd_with_accumulated_gradients():
    "Two batches of 4 are one of 8, for a network without BatchNorm"
    data = batches()
    whole = [(torch.cat([data[i][0], data[i + 1][0]]), torch.cat([data[i][1], data[i + 1][1]])) for i in (0, 2)]
    learn = learner(data=data, net=no_bn)
    theirs = deepcopy(learn.model)
    quiet_fit(learn, 1, 0.03, cbs=GradientAccumulation(8))
    by_hand(theirs, whole, [0.03] * 2)
    equal(learn.model, theirs)


def test_skipped_steps_and_half_precision():
    class Skip(Callback):
        order = 10

        def before_step(self):
            if self.train_iter == 1:
                raise CancelStepException

    data = batches()
    learn = learner(data=data, net=no_bn)
    theirs = deepcopy(learn.model)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        quiet_fit(learn, 1, 0.03, cbs=[Skip(), MixedPrecision(), GradientClip(1e9)])
    by_hand(theirs, [data[i] for i in (0, 2, 3)], [0.03] * 3)
    equal(learn.model, theirs)


def test_save_and_load_with_momentum(tmp_path):
    "The third step after a reload is that of an uninterrupted fit"
    one, two, fresh = learner(tmp_path), learner(tmp_path), learner(tmp_path)
    quiet_fit(one, 2, 0.03)
    quiet_fit(two, 1, 0.03)
    two.save('two')
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        fresh.load('two')
    quiet_fit(fresh, 1, 0.03)
    equal(one.model, fresh.model)


def test_saved_optimizer_holds_no_numpy_numbers(tmp_path):
    learn = learner(tmp_path)
    quiet_fit(learn, 4, method='fit_fixmatch')
    torch.save(learn.opt.state_dict(), tmp_path / 'opt.pth')
    lr = torch.load(tmp_path / 'opt.pth', weights_only=True)['param_groups'][0]['lr']
    assert lr == pytest.approx(0.03 * math.cos(7 * math.pi * 3 / 64))


def test_export_keeps_momentum(make_dls, tmp_path, pool):
    learn = Learner(make_dls(), tiny_net(), path=tmp_path, opt_func=nesterov_sgd, cbs=SaveModelCallback(with_opt=True))
    quiet_fit(learn, 6, method='fit_fixmatch')
    held = [o['momentum_buffer'] for o in learn.opt.opt.state.values()]
    expected = learn.predict(pool[0])[2]
    learn.export()
    still = [o['momentum_buffer'] for o in learn.opt.opt.state.values()]
    assert len(held) == 5 and all(map(torch.equal, held, still))
    loaded = load_learner(tmp_path / 'export.pkl')
    torch.testing.assert_close(loaded.predict(pool[0])[2], expected)
    loaded.dls = learn.dls
    quiet_fit(loaded, 3, method='fit_fixmatch')


def test_lr_find_puts_momentum_back():
    one, two = learner(net=no_bn), learner(net=no_bn)
    quiet_fit(one, 2, 0.03)
    quiet_fit(two, 1, 0.03)
    with two.no_bar(), two.no_logging():
        two.lr_find(num_it=6, show_plot=False, suggest_funcs=None)
    quiet_fit(two, 1, 0.03)
    equal(one.model, two.model)


# the schedule


def test_part_cos():
    f = SchedPartCos(0.03)
    assert f(0) == 0.03
    assert f(1) / 0.03 == pytest.approx(0.19509032)
    assert f(0.5) == pytest.approx(0.03 * 0.77301045)
    assert SchedPartCos(2.0, 0.5)(1) == pytest.approx(0) and SchedPartCos(2.0, 1)(1) == -2
    assert SchedPartCos(np.array([1.0, 2.0]))(0.5).tolist() == pytest.approx([0.77301045, 1.5460209])
    assert pickle.loads(pickle.dumps(f))(0.7) == f(0.7)


@pytest.mark.parametrize('n_steps', [4, 8, 20])
def test_rates_of_each_step(n_steps):
    learn = learner()
    quiet_fit(learn, n_steps, method='fit_fixmatch')
    expected = [0.03 * math.cos(7 * math.pi * k / (16 * n_steps)) for k in range(n_steps)]
    assert learn.recorder.lrs == learn.recorder.hps['lr'] == pytest.approx(expected)
    assert len(learn.recorder.values) == n_steps // 4
    assert learn.recorder.hps.keys() == {'lr'}, 'momentum stays'


def test_the_whole_recipe_by_hand():
    data = batches()
    learn = learner(data=data)
    theirs = deepcopy(learn.model)
    quiet_fit(learn, 8, method='fit_fixmatch', lr=0.1, wd=0.01)
    by_hand(theirs, data * 2, [0.1 * math.cos(7 * math.pi * k / 128) for k in range(8)], wd=0.01)
    equal(learn.model, theirs)


RATES = [(slice(0.01, 0.1), [0.01, 0.1]), (slice(0.1), [0.01, 0.1]), ([0.2, 0.3], [0.2, 0.3]), (None, [1e-3, 1e-3])]


@pytest.mark.parametrize('lr,expected', RATES)
def test_rates_of_groups(lr, expected):
    learn, seen = learner(splitter=two_groups), []

    class Look(Callback):
        order = 70

        def before_batch(self):
            if self.training:
                seen.append([h['lr'] for h in self.learn.opt.hypers])

    quiet_fit(learn, 8, method='fit_fixmatch', lr=lr, cbs=Look())
    assert np.array(seen).shape == (8, 2)
    np.testing.assert_allclose(seen, np.cos(7 * np.pi * np.arange(8) / 128)[:, None] * expected)


def test_resume_at_an_epoch():
    learn = learner()
    quiet_fit(learn, 16, method='fit_fixmatch', start_epoch=2)
    assert learn.recorder.lrs == pytest.approx([0.03 * math.cos(7 * math.pi * k / 256) for k in range(8, 16)])


def test_other_optimisers_and_reset():
    learn = learner(opt_func=SGD)
    quiet_fit(learn, 4, method='fit_fixmatch')
    opt = learn.opt
    quiet_fit(learn, 4, method='fit_fixmatch')
    assert learn.opt is opt
    quiet_fit(learn, 4, method='fit_fixmatch', reset_opt=True)
    assert learn.opt is not opt
    assert learn.recorder.lrs == pytest.approx([0.03 * math.cos(7 * math.pi * k / 64) for k in range(4)])
    assert not learn._grab_cbs(ParamScheduler)


@pytest.mark.parametrize('n_steps,fits', [(10, '8 or 12'), (3, '4'), (0, '4'), (-4, '4'), (4.5, '4 or 8')])
def test_steps_that_make_no_epochs(n_steps, fits):
    learn = learner()
    message = f'multiple of 4, the steps of an epoch, such as {fits}, but is {n_steps}. .*repeat_train'
    with pytest.raises(ValueError, match=message):
        quiet_fit(learn, n_steps, method='fit_fixmatch')
    assert learn.opt is None


def test_float_that_is_whole():
    learn = learner()
    quiet_fit(learn, 8e0, method='fit_fixmatch')
    assert len(learn.recorder.values) == 2


def test_schedule_without_batches(make_dls):
    learn = Learner(make_dls(bs=64, n_batches=None), tiny_net(), opt_func=nesterov_sgd)
    with pytest.raises(ValueError, match='no batch.*repeat_train'):
        quiet_fit(learn, 10, method='fit_fixmatch')


def test_the_papers_recipe_with_fixmatch(make_learner):
    learn = make_learner(opt_func=nesterov_sgd)
    quiet_fit(learn, 6, method='fit_fixmatch')
    assert len(learn.fix_match.history) == 6
    assert isinstance(learn.opt.opt, torch.optim.SGD) and isinstance(learn.model[3], nn.Linear)


def test_tensorboard_beside_it(make_learner, tmp_path):
    "fastai's callback writes every hyper-parameter as a number, and some of torch's are None"
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback

    board = TensorBoardCallback(tmp_path / 'logs', trace_model=False, log_preds=False)
    learn = make_learner(opt_func=nesterov_sgd, cbs=[board])
    quiet_fit(learn, 3, method='fit_fixmatch')
    assert list((tmp_path / 'logs').iterdir()) and None not in learn.opt.hypers[0].values()
    assert learn.opt.hypers[0]['lr'] == pytest.approx(0.03 * math.cos(7 * math.pi / 16 * 2 / 3))
