"Training on two processes, with gloo, on the CPU; and on DataParallel's replicas"

import os
import socket
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from cli_runs import folders, train  # noqa: F401  a fixture
from conftest import Raise, no_bn, quiet_fit, tiny_net
from fastai.vision.all import SGD, Callback, Learner, accuracy, parent_label, set_seed
from two_processes import Replicas, broadcast_on_the_cpu, in_two

from fixmatch_fastai.all import (
    UDA,
    AdaMatch,
    Dash,
    DebiasMatch,
    FixedThreshold,
    FixMatch,
    FixMatchTransform,
    FlexMatch,
    FreeMatch,
    ModelEMA,
    SaveFixMatch,
    SoftMatch,
    StopOnTrouble,
    weak_augment,
)
from fixmatch_fastai.cli.experiment import main as experiment
from fixmatch_fastai.core import only_writer
from fixmatch_fastai.uncertainty import FeatureDensity

pytest.importorskip('accelerate')

POLICIES = dict(
    FixedThreshold=lambda: FixedThreshold(0.12),
    FlexMatch=lambda: FlexMatch(0.3),
    FreeMatch=lambda: FreeMatch(decay=0.9),
    SoftMatch=lambda: SoftMatch(decay=0.9),
    AdaMatch=lambda: AdaMatch(decay=0.9),
    UDA=lambda: UDA(0.2),
    Dash=lambda: Dash(warmup=3, every=1),
    DebiasMatch=lambda: DebiasMatch(0.2, decay=0.9),
    density=lambda: FixedThreshold(0.1) & FeatureDensity(),
)


class FirstStep(Callback):
    "What it saw: labelled, weak and strong images in one batch, the targets, and the weights before it"

    order, run_valid, seen = 100, False, None

    def before_batch(self):
        if self.seen is None:
            params = [p.detach().clone() for p in self.model.parameters()]
            self.seen = SimpleNamespace(x=self.x.detach().clone(), y=self.y.clone(), params=params)


def fit_together(
    rank,
    make_dls,
    pool,
    path,
    policy='FixedThreshold',
    forward='joint',
    model=tiny_net,
    cbs=(),  # Functions that make callbacks
    epochs=2,
    n_batches=6,
    num_workers=0,
):
    dls = make_dls(bs=4, n_batches=n_batches, num_workers=num_workers)
    tfm = FixMatchTransform(weak=weak_augment(flip=False))
    loader = dls.unlabeled_dl(pool, mu=2, tfm=tfm, label_func=parent_label)
    set_seed(0)  # the same in both, as users have it
    fm = FixMatch(loader, policy=POLICIES[policy](), forward=forward)
    idxs, first = [], FirstStep()
    fm.policy.register_forward_hook(lambda policy, batch, pseudo: idxs.append(batch[0].idxs))
    cbs = [fm, first, *[cb() for cb in cbs]]
    learn = Learner(dls, model(), opt_func=SGD, metrics=accuracy, path=path, cbs=cbs)
    with learn.distrib_ctx(sync_bn=False):
        quiet_fit(learn, epochs, 0.1, wd=0.0)
    return SimpleNamespace(
        params=[p.detach().clone() for p in learn.model.parameters()],
        idxs=torch.cat(idxs),
        first=first.seen,
        values=[dict(zip(learn.recorder.metric_names[1:], o)) for o in learn.recorder.values],
        policy=dict(fm.policy.state_dict()),
        history=fm.history,
        stream=fm.stream,
    )


def fit_with(rank, make_dls, pool, path, options):
    return fit_together(rank, make_dls, pool, path, **options)


@pytest.fixture
def together(make_dls, pool, tmp_path):
    return lambda **options: in_two(fit_with, tmp_path, make_dls, pool, tmp_path, options)


def assert_as_one(a, b):
    same = [torch.equal(p, q) for p, q in zip(a.params, b.params, strict=True)]
    assert all(same), 'parameters differ between the processes'
    assert a.policy.keys() == b.policy.keys()
    same = [torch.equal(a.policy[k].nan_to_num(7), b.policy[k].nan_to_num(7)) for k in a.policy]
    assert all(same), 'the policies remember different things'


COLUMNS = ['loss_x', 'loss_u', 'mask_rate', 'pseudo_acc']


@pytest.mark.parametrize('policy', POLICIES)
def test_policies_are_the_same_in_both_processes(together, policy):
    a, b = together(policy=policy)
    assert_as_one(a, b)
    for p, q in zip(a.values, b.values):
        assert [p[o] for o in COLUMNS] == pytest.approx([q[o] for o in COLUMNS], nan_ok=True)


@pytest.mark.parametrize('num_workers', [0, 1])
def test_processes_share_the_pool(together, pool, num_workers):
    "No image comes in both, and none is left out"
    # 13 steps of 8 in each of two: twice the pool of 100 and a bit
    a, b = together(n_batches=26, epochs=1, num_workers=num_workers)
    seen = torch.stack([a.idxs.view(-1, 8), b.idxs.view(-1, 8)], 1).flatten()
    assert len(seen) == 208
    for half in (seen[:100], seen[100:200]):
        assert half.sort().values.equal(torch.arange(100))
    assert not a.first.x.equal(b.first.x), 'each process sees other images'
    assert a.stream is None and b.stream is None


def test_columns_are_over_both_processes(together):
    a, b = together(n_batches=6, epochs=1)
    h = {name: torch.tensor([*a.history[name], *b.history[name]]) for name in COLUMNS}  # of batches of one size
    expected = {name: h[name].mean().item() for name in COLUMNS[:3]}
    counted = h['mask_rate']
    expected['pseudo_acc'] = ((h['pseudo_acc'].nan_to_num() * counted).sum() / counted.sum()).item()
    for o in (a, b):
        for name, v in expected.items():
            assert o.values[0][name] == pytest.approx(v, rel=1e-5), name


def test_one_step_of_two_processes_is_that_of_the_joined_batch(together):
    "Two processes with half the images each take the step of one process with all, without BatchNorm"
    a, b = together(n_batches=2, epochs=1, model=no_bn)
    net = no_bn()
    for p, v in zip(net.parameters(), a.first.params):
        p.data.copy_(v)
    loss_x = loss_u = 0
    for first in (a.first, b.first):
        logits = net(first.x.as_subclass(torch.Tensor))
        n_x = len(first.y)
        weak, strong = logits[n_x:].chunk(2)
        confidence, k = weak.detach().softmax(1).max(1)
        loss_x = loss_x + F.cross_entropy(logits[:n_x], first.y.as_subclass(torch.Tensor)) / 2
        loss_u = loss_u + ((confidence >= 0.12) * F.cross_entropy(strong, k, reduction='none')).mean() / 2
    assert loss_u > 0
    (loss_x + loss_u).backward()
    for p, q in zip(net.parameters(), a.params):
        torch.testing.assert_close(p - 0.1 * p.grad, q, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('policy', ['FixedThreshold', 'AdaMatch'])
def test_forwards_are_the_same_in_two_processes(make_dls, pool, tmp_path, policy):
    "Though other numbers count in each process, the steps are those of the joint pass, without BatchNorm"

    def run(forward):
        (tmp_path / forward).mkdir()
        options = dict(policy=policy, forward=forward, model=no_bn)
        return in_two(fit_with, tmp_path / forward, make_dls, pool, tmp_path, options)

    joint = run('joint')
    for forward in ('split', 'selective'):
        a, b = run(forward)
        assert_as_one(a, b)
        for p, q in zip(joint[0].params, a.params):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
        for o, other in zip(joint, (a, b)):
            assert other.history.mask_rate.tolist() == o.history.mask_rate.tolist()
    different = joint[0].history.mask_rate != joint[1].history.mask_rate
    assert different.any(), 'the processes should differ in what counts'


def test_averages_are_the_same_in_both_processes(together):
    assert_as_one(*together(cbs=[lambda: ModelEMA(half_life=2)]))


def fit_uneven(rank, make_dls, pool, path):
    "21 of 22 labelled images in batches of 4: a short last batch, and an image for which the other process repeats one"
    dls = make_dls(bs=4, n_batches=None)
    dls.train.drop_last = False
    dls.train = dls.train.new(dls.train.dataset, drop_last=False)
    loader = dls.unlabeled_dl(pool[:7], mu=2, tfm=FixMatchTransform(weak=weak_augment(flip=False)))
    learn = Learner(dls, no_bn(), metrics=accuracy, path=path, cbs=FixMatch(loader, policy=FreeMatch(decay=0.9)))
    sizes = []

    class Sizes(Callback):
        def after_pred(self):
            if self.training:
                sizes.append(len(self.x))

    with learn.distrib_ctx(sync_bn=False):
        quiet_fit(learn, 2, cbs=Sizes())
    params = [p.detach().clone() for p in learn.model.parameters()]
    return SimpleNamespace(params=params, policy=dict(learn.fix_match.policy.state_dict()), sizes=sizes)


def test_short_last_batch_and_small_pool_in_two_processes(make_dls, pool, tmp_path):
    a, b = in_two(fit_uneven, tmp_path, make_dls, pool, tmp_path)
    assert_as_one(a, b)
    assert a.sizes == b.sizes and min(a.sizes) < max(a.sizes)


def look_alone(rank, make_dls, pool, path):
    "Pictures are made in one process, while the others do something else"
    dls = make_dls()
    fix_match = FixMatch(dls.unlabeled_dl(pool, mu=2), policy=FreeMatch(decay=0.9))
    learn = Learner(dls, tiny_net(), path=path, cbs=fix_match)
    with learn.distrib_ctx(sync_bn=False):
        quiet_fit(learn, 1)
        if rank == 0:
            learn.fix_match.peek()
            learn.fix_match.show_pseudo_labels(4)
    if rank == 0:
        learn.fix_match.show_pseudo_labels(4)
    return len(learn.dls.train), type(learn.dls.train).__name__


def test_pictures_in_one_process(make_dls, pool, tmp_path):
    assert in_two(look_alone, tmp_path, make_dls, pool, tmp_path) == [(3, 'RepeatDL')] * 2


def in_trouble(rank, make_dls, pool, path):
    "In one process alone the loss becomes NaN: both stop"
    dls = make_dls(n_batches=20)
    learn = Learner(dls, tiny_net(), path=path, cbs=[FixMatch(dls.unlabeled_dl(pool, mu=2)), StopOnTrouble()])

    class Spoil(Callback):
        def before_batch(self):
            if self.training and rank == 1 and self.iter == 5:
                self.learn.xb = (self.xb[0] * float('nan'),)

    with learn.distrib_ctx(sync_bn=False):
        quiet_fit(learn, 3, cbs=Spoil())
    return learn.epoch, list(learn.fix_match.trouble)


@pytest.mark.filterwarnings('ignore:The loss is not')
def test_trouble_stops_both_processes(make_dls, pool, tmp_path):
    assert in_two(in_trouble, tmp_path, make_dls, pool, tmp_path) == [(0, ['not_finite'])] * 2


def launched(make_dls, pool, path):
    broadcast_on_the_cpu()
    rank = int(os.environ['RANK'])
    torch.save(fit_together(rank, make_dls, pool, path), path / f'{rank}.pt')


@pytest.mark.slow
def test_notebook_launcher(make_dls, pool, tmp_path, monkeypatch):
    "accelerate's way to more processes from a notebook"
    accelerate = pytest.importorskip('accelerate')
    monkeypatch.setenv('ACCELERATE_USE_CPU', 'true')
    with socket.create_server(('127.0.0.1', 0)) as s:
        port = str(s.getsockname()[1])  # a free one
    launch = dict(args=(launched, (make_dls, pool, tmp_path)), kwargs=dict(num_processes=2, use_port=port))
    # from a process of its own, as it keeps the signals of the one it was called in
    notebook = mp.get_context('fork').Process(target=accelerate.notebook_launcher, **launch)
    notebook.start()
    notebook.join(120)
    if notebook.is_alive():
        notebook.terminate()
        notebook.join(40)
    assert notebook.exitcode == 0
    a, b = (torch.load(tmp_path / f'{rank}.pt', weights_only=False) for rank in range(2))
    assert_as_one(a, b)
    assert not set(a.idxs[:48].tolist()) & set(b.idxs[:48].tolist()), 'no image in both'


@pytest.mark.parametrize('n', [2, 3])
def test_replicas_take_the_step_of_one(make_learner, n):
    "Rows in the order of the replicas come back in ours; without BatchNorm the step is the one without replicas"
    every = dict(threshold=0.05)  # below 1 in 10: every pseudo-label counts, whatever the weights
    plain, parallel = (make_learner(model=no_bn(), fixmatch=every) for _ in range(2))
    parallel.model.load_state_dict(plain.model.state_dict())
    parallel.model = net = Replicas(parallel.model, n)
    for learn in (plain, parallel):
        set_seed(1)
        quiet_fit(learn, 1)
    assert plain.fix_match.history.mask_rate.min() == 1 and len(net.seen) >= 3
    for p, q in zip(plain.model.parameters(), net.module.parameters()):
        torch.testing.assert_close(p, q)


# --- of two that train in one folder, the second is refused


@pytest.fixture
def written_elsewhere():
    "`written_elsewhere(folder, name)`: another process writes there until the test ends"
    fork = mp.get_context('fork')
    ends = []

    def write(folder, name=''):
        begun, end = fork.SimpleQueue(), fork.SimpleQueue()

        def hold():
            with only_writer(folder, RuntimeError('in use'), name):
                begun.put(True)
                end.get()

        process = fork.Process(target=hold)
        process.start()
        ends.append((process, end))
        return begun.get()

    yield write
    for process, end in ends:
        end.put(True)
        process.join()


@pytest.mark.parametrize('resume', [False, True])
def test_a_second_command_is_refused(folders, written_elsewhere, tmp_path, capsys, monkeypatch, resume):  # noqa: F811
    monkeypatch.chdir(folders)
    out = tmp_path / 'run'
    written_elsewhere(out)
    assert train('--no-check', '--epochs', 1, '--out', out, *['--resume'] * resume) == 2
    assert 'is being written by another process: wait until it ends' in capsys.readouterr().err
    assert [o.name for o in out.iterdir()] == ['.lock']


def test_an_experiment_is_refused_where_another_writes(written_elsewhere, tmp_path, capsys):
    written_elsewhere(tmp_path / 'a/seed_1')
    config = 'data=digits n_labels=20 name=a seed=1 steps=2 eval_every=1 workers=0'.split()
    assert experiment([*config, f'out={tmp_path}']) == 2
    assert 'is being written by another process' in capsys.readouterr().err


def test_a_checkpoint_has_one_writer(make_learner, written_elsewhere, tmp_path):
    learn = make_learner()
    written_elsewhere(tmp_path / 'models', 'a.pth')
    with pytest.raises(ValueError, match='Another process trains with a.pth.*give another `fname`'):
        quiet_fit(learn, 1, cbs=SaveFixMatch('a'))
    for exc in (KeyboardInterrupt, RuntimeError):
        with pytest.raises(exc):
            quiet_fit(learn, 1, cbs=[SaveFixMatch('b'), Raise('after_pred', exc)])
        assert not (tmp_path / 'models/.b.pth.lock').exists(), 'let go, though the learner lives on'
    quiet_fit(learn, 1, cbs=SaveFixMatch('b'))
    assert (tmp_path / 'models/b.pth').exists() and not (tmp_path / 'models/.b.pth.lock').exists()


# --- an error in one process is an error in all


def fit_apart(rank, make_dls, pool, path, kind, policy):
    dls = make_dls(n_batches=6)
    items = {'fewer': pool[rank:], 'other order': pool[::-1] if rank else pool}.get(kind, pool)
    loader = dls.unlabeled_dl(items, mu=2)
    learn = Learner(dls, no_bn(), path=path, cbs=FixMatch(loader, policy=POLICIES[policy]()))
    if rank and kind == 'at the beginning':
        learn.fix_match.preflight = lambda: 1 / 0
    if rank and kind == 'in a step':
        stream, learn.fix_match.preflight = loader.stream, None
        loader.stream = lambda *args: iter([next(stream(*args))])  # then it ends
    begun = time.monotonic()
    with learn.distrib_ctx(sync_bn=False):
        with pytest.raises((ValueError, RuntimeError, ZeroDivisionError)) as e:
            quiet_fit(learn, 1)
        dist.barrier()  # as both live on
    return type(e.value).__name__, str(e.value), time.monotonic() - begun


@pytest.mark.parametrize(
    'kind,policy,error',
    [
        ('fewer', 'FixedThreshold', 'Process 1 has 99 unlabelled images, and process 0 has 100: give all the same'),
        ('fewer', 'FlexMatch', 'Process 1 has 99 unlabelled images'),
        ('other order', 'FreeMatch', 'Process 1 has other unlabelled images than process 0, or the same in another'),
        ('at the beginning', 'FixedThreshold', 'Process 1 ended with an error, so this one, 0, does too: ZeroDivision'),
        (
            'in a step',
            'FixedThreshold',
            'Process 1 ended with an error, so this one, 0, does too: ValueError: The unlab',
        ),
    ],
)
def test_an_error_in_one_process_reaches_the_other(make_dls, pool, tmp_path, kind, policy, error):
    (_, first, seconds), _ = in_two(fit_apart, tmp_path, make_dls, pool, tmp_path, kind, policy)
    assert error in first and seconds < 60
