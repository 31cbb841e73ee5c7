"Training on several processes: two, with gloo, on the CPU"

import os
import socket
import time
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from conftest import no_bn, quiet_fit, tiny_net
from fastai.vision.all import SGD, Callback, Learner, accuracy, nn, parent_label, set_seed

from fixmatch_fastai.all import (
    UDA,
    AdaMatch,
    Dash,
    DebiasMatch,
    FeatureDensity,
    FixedThreshold,
    FixMatch,
    FixMatchTransform,
    FlexMatch,
    FreeMatch,
    ModelEMA,
    SoftMatch,
    StopOnTrouble,
    weak_augment,
)
from fixmatch_fastai.batch import interleaved

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


def in_two(task, folder, *args, limit=120):
    "What `task(rank, *args)` returns in each of two processes; a failure or a hang in one fails the test"
    ctx = mp.get_context('fork')  # spawned ones would import fastai anew
    procs = [ctx.Process(target=_run, args=(task, rank, str(folder), args)) for rank in range(2)]
    for p in procs:
        p.start()
    end = time.time() + limit
    while any(p.is_alive() for p in procs) and time.time() < end and not any(p.exitcode for p in procs):
        time.sleep(0.05)
    hung = [rank for rank, p in enumerate(procs) if p.is_alive()] if time.time() >= end else []
    for p in procs:
        p.kill() if p.exitcode is None and (hung or any(o.exitcode for o in procs)) else p.join()
    assert not hung, f'processes {hung} were still waiting after {limit} s'
    errors = [(folder / f'{rank}.txt').read_text() for rank in range(2) if (folder / f'{rank}.txt').exists()]
    assert not errors, '\n'.join(errors)
    return [torch.load(folder / f'{rank}.pt', weights_only=False) for rank in range(2)]


def _run(task, rank, folder, args):
    try:
        import fastai.distributed

        # it calls `.cuda()`, as NCCL needs
        fastai.distributed.DistributedDL._broadcast = broadcast
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', ACCELERATE_USE_CPU='true', MASTER_ADDR='127.0.0.1', MASTER_PORT='0')
        dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
        torch.save(task(rank, *args), f'{folder}/{rank}.pt')
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        with open(f'{folder}/{rank}.txt', 'w') as f:
            f.write(f'process {rank}: {traceback.format_exc()}')
        os._exit(1)


def broadcast(self, t, rank):
    t = torch.tensor(t)
    dist.broadcast(t, rank)
    return t.tolist()


class Noted(Callback):
    "What each step saw"

    order, run_valid = 100, False

    def __init__(self):
        self.idxs, self.first = [], None

    def before_batch(self):
        step = self.learn.fix_match._pending
        self.idxs.append(step.idxs)
        if self.first is None:
            self.first = self.x.detach().clone(), self.y.clone(), (step.n_x, step.n_u), [p.detach().clone() for p in self.model.parameters()]


def state(learn):
    return [p.detach().clone() for p in learn.model.parameters()]


def fit_together(rank, make_dls, pool, path, how):
    dls = make_dls(bs=4, n_batches=how.get('n_batches', 6), num_workers=how.get('num_workers', 0))
    loader = dls.unlabeled_dl(pool, mu=2, tfm=FixMatchTransform(weak=weak_augment(flip=False)), label_func=parent_label)
    set_seed(0)  # the same in both, as users have it
    noted = Noted()
    fm = FixMatch(loader, policy=POLICIES[how.get('policy', 'FixedThreshold')](), forward=how.get('forward', 'joint'))
    cbs = [fm, noted, *[cb() for cb in how.get('cbs', ())]]
    learn = Learner(dls, how.get('model', tiny_net)(), opt_func=SGD, metrics=accuracy, path=path, cbs=cbs)
    with learn.distrib_ctx(sync_bn=False):
        quiet_fit(learn, how.get('epochs', 2), 0.1, wd=0.0)
    return dict(
        params=state(learn),
        idxs=torch.cat(noted.idxs),
        first=noted.first,
        values=learn.recorder.values,
        names=learn.recorder.metric_names,
        policy=fm.policy.state_dict(),
        steps=fm._recorder._steps,
        trouble=fm._recorder.trouble,
        stream=fm.stream is None,
    )


@pytest.fixture
def together(make_dls, pool, tmp_path):
    return lambda **how: in_two(fit_together, tmp_path, make_dls, pool, tmp_path, how)


def assert_as_one(a, b):
    assert all(torch.equal(p, q) for p, q in zip(a['params'], b['params'])), 'parameters differ between the processes'
    assert a['policy'].keys() == b['policy'].keys()
    assert all(torch.equal(a['policy'][k].nan_to_num(7), b['policy'][k].nan_to_num(7)) for k in a['policy']), 'the policies remember different things'


@pytest.mark.parametrize('policy', POLICIES)
def test_policies(together, policy):
    a, b = together(policy=policy)
    assert_as_one(a, b)
    assert sum((list(v)[3:] for v in a['values']), []) == pytest.approx(sum((list(v)[3:] for v in b['values']), []), nan_ok=True), 'our columns'


@pytest.mark.parametrize('num_workers', [0, 1])
def test_shares_of_the_pool(together, pool, num_workers):
    "A pass over the pool is shared out: no image in both, and none left out"
    a, b = together(n_batches=26, epochs=1, num_workers=num_workers)  # 13 steps of 8 in each of two: twice the pool of 100 and a bit
    seen = torch.stack([a['idxs'].view(-1, 8), b['idxs'].view(-1, 8)], 1).flatten()
    assert len(seen) == 208
    assert seen[:100].sort().values.equal(torch.arange(100)) and seen[100:200].sort().values.equal(torch.arange(100))
    assert not a['first'][0].equal(b['first'][0]), 'each process sees other images'
    assert a['stream'] and b['stream']


def test_columns_are_over_both(together):
    a, b = together(n_batches=6, epochs=1)
    names = a['names']
    steps = torch.tensor(a['steps'].tolist() + b['steps'].tolist())
    lx, lu, mask, correct, counted, n_x, n_u = steps.T[:7]
    expected = dict(
        loss_x=(lx * n_x).sum() / n_x.sum(),
        loss_u=(lu * n_u).sum() / n_u.sum(),
        mask_rate=(mask * n_u).sum() / n_u.sum(),
        pseudo_acc=correct.sum() / counted.sum(),
    )
    for o in (a, b):
        for name, v in expected.items():
            assert o['values'][0][names.index(name) - 1] == pytest.approx(v.item(), rel=1e-5), name


def test_one_step_is_that_of_the_joined_batch(together):
    "Two processes with half the images each take the step of one process with all, without BatchNorm"
    a, b = together(n_batches=2, epochs=1, model=no_bn)
    net = no_bn()
    for p, v in zip(net.parameters(), a['first'][3]):
        p.data.copy_(v)
    loss_x = loss_u = 0
    for x, y, (n_x, n_u), _ in (a['first'], b['first']):
        logits = net(x.as_subclass(torch.Tensor))
        weak, strong = logits[n_x:].split(n_u)
        confidence, k = weak.detach().softmax(1).max(1)
        loss_x = loss_x + F.cross_entropy(logits[:n_x], y.as_subclass(torch.Tensor)) / 2
        loss_u = loss_u + ((confidence >= 0.12) * F.cross_entropy(strong, k, reduction='none')).mean() / 2
    assert loss_u > 0
    (loss_x + loss_u).backward()
    for p, q in zip(net.parameters(), a['params']):
        torch.testing.assert_close(p - 0.1 * p.grad, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('policy', ['FixedThreshold', 'AdaMatch'])
def test_forward(make_dls, pool, tmp_path, policy):
    "Weak views in a pass of their own, and other numbers that count in each process: the steps are those of the joint pass, without BatchNorm"

    def run(forward):
        (tmp_path / forward).mkdir()
        return in_two(fit_together, tmp_path / forward, make_dls, pool, tmp_path, dict(policy=policy, forward=forward, model=no_bn))

    joint = run('joint')
    for forward in ('split', 'selective'):
        a, b = run(forward)
        assert_as_one(a, b)
        for p, q in zip(joint[0]['params'], a['params']):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
        for o, other in zip(joint, (a, b)):
            assert other['steps'][:, 2].tolist() == o['steps'][:, 2].tolist(), 'mask rates'
    assert (joint[0]['steps'][:, 2] != joint[1]['steps'][:, 2]).any(), 'the processes should differ in what counts'


def test_ema(together):
    a, b = together(cbs=[lambda: ModelEMA(half_life=2)])
    assert_as_one(a, b)


def fit_uneven(rank, make_dls, pool, path):
    "21 labelled images of 22 in batches of 4: a short last batch, and one image for which the other process repeats another"
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
    return dict(params=state(learn), policy=learn.fix_match.policy.state_dict(), sizes=sizes)


def test_short_last_batch_and_small_pool(make_dls, pool, tmp_path):
    a, b = in_two(fit_uneven, tmp_path, make_dls, pool, tmp_path)
    assert_as_one(a, b)
    assert a['sizes'] == b['sizes'] and min(a['sizes']) < max(a['sizes'])


def look_alone(rank, make_dls, pool, path):
    "Pictures are made in one process, while the others do something else"
    dls = make_dls()
    learn = Learner(dls, tiny_net(), path=path, cbs=FixMatch(dls.unlabeled_dl(pool, mu=2), policy=FreeMatch(decay=0.9)))
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
    "In one process alone the loss becomes nan: both stop"
    dls = make_dls(n_batches=20)
    learn = Learner(dls, tiny_net(), path=path, cbs=[FixMatch(dls.unlabeled_dl(pool, mu=2)), StopOnTrouble()])

    class Spoil(Callback):
        def before_batch(self):
            if self.training and rank == 1 and self.iter == 5:
                self.learn.xb = (self.xb[0] * float('nan'),)

    with learn.distrib_ctx(sync_bn=False):
        quiet_fit(learn, 3, cbs=Spoil())
    return learn.epoch, list(learn.fix_match._recorder.trouble)


@pytest.mark.filterwarnings('ignore:The loss is not')
def test_trouble_stops_both(make_dls, pool, tmp_path):
    assert in_two(in_trouble, tmp_path, make_dls, pool, tmp_path) == [(0, ['not_finite'])] * 2


def launched(make_dls, pool, path):
    import fastai.distributed

    fastai.distributed.DistributedDL._broadcast = broadcast
    rank = int(os.environ['RANK'])
    torch.save(fit_together(rank, make_dls, pool, path, {}), path / f'{rank}.pt')


def test_notebook_launcher(make_dls, pool, tmp_path, monkeypatch):
    "accelerate's way to several processes from a notebook; here from a process of its own, as it keeps the signals of the one it was called in"
    accelerate = pytest.importorskip('accelerate')
    monkeypatch.setenv('ACCELERATE_USE_CPU', 'true')
    with socket.create_server(('127.0.0.1', 0)) as s:
        port = str(s.getsockname()[1])  # a free one
    opts = dict(num_processes=2, use_port=port)
    notebook = mp.get_context('fork').Process(target=accelerate.notebook_launcher, args=(launched, (make_dls, pool, tmp_path)), kwargs=opts)
    notebook.start()
    notebook.join(120)
    if notebook.is_alive():
        notebook.terminate()
        notebook.join(40)
    assert notebook.exitcode == 0
    a, b = (torch.load(tmp_path / f'{rank}.pt', weights_only=False) for rank in range(2))
    assert_as_one(a, b)
    assert not set(a['idxs'][:48].tolist()) & set(b['idxs'][:48].tolist()), 'no image in both'


# --- DataParallel ------------------------------------------------------------------------------------------------------------------------


class Replicas(nn.DataParallel):
    "DataParallel's split into replicas, on the CPU"

    def __init__(self, net, n):
        super().__init__(net)
        self.device_ids, self.seen = list(range(n)), []

    def forward(self, x):
        parts = x.chunk(len(self.device_ids))
        self.seen.append(parts)
        return torch.cat([self.module(o) for o in parts])


@pytest.mark.parametrize('n', [2, 3])
def test_each_replica_gets_its_share(make_learner, n):
    "Every replica sees labelled, weak and strong images, and the step is the one without replicas (no BatchNorm)"
    plain, parallel = (make_learner(model=no_bn(), fixmatch=dict(threshold=0.05)) for _ in range(2))  # below 1 in 10: every pseudo-label counts, whatever the weights
    parallel.model.load_state_dict(plain.model.state_dict())
    set_seed(1)
    quiet_fit(plain, 1)
    assert plain.fix_match.history.mask_rate.min() == 1
    net = Replicas(parallel.model, n)
    parallel.model = net

    class Joint(Callback):
        order, run_valid = 4, False

        def after_pred(self):
            order = self.learn.fix_match._pending.order
            kinds = torch.tensor([0] * 4 + [1] * 8 + [2] * 8)[order]
            assert all(len(set(o.tolist())) == 3 for o in kinds.chunk(n))

    set_seed(1)
    quiet_fit(parallel, 1, cbs=Joint())
    assert len(net.seen) >= 3
    for p, q in zip(plain.model.parameters(), net.module.parameters()):
        torch.testing.assert_close(p, q)


def test_no_interleaving_elsewhere():
    assert interleaved(12, tiny_net()) is None and interleaved(12, nn.DataParallel(tiny_net())) is None
    assert interleaved(7, Replicas(tiny_net(), 3)).tolist() == [0, 3, 6, 1, 4, 2, 5]
