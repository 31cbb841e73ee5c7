"What the tests share: tiny images, tiny networks, and a fit without noise"

import gc
import multiprocessing
import shutil
import signal
import tracemalloc  # noqa: F401  else pytest imports it to report an unclosed file, which can be within an import
import warnings

warnings.filterwarnings('ignore', category=FutureWarning)  # before fastai is imported

import matplotlib
import numpy as np
import pytest
import torch
from fastai.vision.all import (
    Callback,
    CategoryBlock,
    ConvLayer,
    DataBlock,
    ImageBlock,
    IndexSplitter,
    Learner,
    NormType,
    PILImageBW,
    accuracy,
    get_image_files,
    nn,
    parent_label,
    set_seed,
)
from matplotlib.figure import Figure
from PIL import Image

from fixmatch_fastai.all import FixMatch, FixMatchTransform, digits_path, split_labeled, weak_augment

matplotlib.use('agg')
# a shell's background processes ignore Ctrl-C, and so would those they start
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # tiny networks: more threads only wait for each other


MADE_ONCE = 'elsewhere', 'taught_run', 'tuned', 'run', 'in_two_processes', 'uri'  # fixtures that take long to make


@pytest.hookimpl(tryfirst=True)  # before xdist settles on "load"
def pytest_cmdline_main(config):
    "Tests that share what takes long to make go to one process"
    if getattr(config.option, 'numprocesses', None) and config.option.dist == 'no':
        config.option.dist = 'loadgroup'


@pytest.hookimpl(tryfirst=True)  # before pytest selects by markers, and xdist by groups
def pytest_collection_modifyitems(items):
    "`pytest -m quick` is the first case of each test that is not slow, and shares nothing that takes long to make"
    seen = set()
    for item in items:
        shared = [o for o in MADE_ONCE if o in item.fixturenames]
        if shared:
            item.add_marker(pytest.mark.xdist_group(shared[0]))
        test = item.path, item.originalname
        if test not in seen and not shared and item.get_closest_marker('slow') is None:
            item.add_marker('quick')
        seen.add(test)


def tiny_net(n_out=10, norm=NormType.Batch, n_in=1):
    conv = ConvLayer(n_in, 8, stride=2, norm_type=norm)
    return nn.Sequential(conv, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(8 * 16, n_out))


def no_bn(n_out=10):
    return tiny_net(n_out, norm=None)


class Odd(nn.Module):
    "Has a statistic that is not saved, one that each pass replaces, and modes of its own"

    def __init__(self):
        super().__init__()
        self.net, self.frozen = tiny_net(), nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(0.1))
        self.register_buffer('unsaved', torch.zeros(1), persistent=False)
        self.register_buffer('replaced', torch.zeros(1))

    def forward(self, x):
        self.unsaved += 1
        self.replaced = self.replaced + 1
        return self.net(self.frozen(x))


class Seen(Callback):
    "Gradients of the first step, and how many images were in each pass"

    order = 100

    def __init__(self):
        self.grads, self.passes = None, []

    def before_fit(self):
        self.hook = self.model.register_forward_pre_hook(self.note)

    def note(self, model, inputs):
        if model.training:
            self.passes.append((len(inputs[0]), torch.is_grad_enabled()))

    def after_fit(self):
        self.hook.remove()

    def before_step(self):
        if self.grads is None:
            self.grads = [p.grad.clone() for p in self.model.parameters() if p.grad is not None]


class Raise(Callback):
    "Raises `exc` the second time `event` comes (the first, where it comes once a fit), before or after all others"

    def __init__(self, event, exc, order=-20, times=None):
        self._event, self._exc, self.order, self._n = event, exc, order, 0
        self._when = times or (1 if event in ('before_fit', 'after_fit') else 2)

    def __call__(self, event_name):
        if event_name == self._event:
            self._n += 1
            if self._n == self._when:
                raise self._exc('stop')


def quiet_fit(learn, *args, method='fit', **kwargs):
    with learn.no_bar(), learn.no_logging():
        return getattr(learn, method)(*args, **kwargs)


@pytest.fixture(autouse=True)
def no_process_left():
    "A loader that a test leaves running would fail another, which looks for such"
    yield
    if multiprocessing.active_children():
        gc.collect()
        left = multiprocessing.active_children()
        for p in left:
            p.kill()
        assert not left, 'the test leaves processes running'


@pytest.fixture(scope='session')
def digits():
    return get_image_files(digits_path()).sorted()


@pytest.fixture(scope='session')
def pool(digits):
    return split_labeled(digits, parent_label, 100, seed=1)[0]


@pytest.fixture(scope='session')
def few_digits(digits, tmp_path_factory):
    "A folder as experiments take it: of each class 10 digits to train on, and 4 to test on"
    folder = tmp_path_factory.mktemp('few') / 'digits'
    train, rest = split_labeled(digits, parent_label, 100, seed=0)
    test, _ = split_labeled(rest, parent_label, 40, seed=0)
    for part, files in (('train', train), ('test', test)):
        for o in files:
            (folder / part / parent_label(o)).mkdir(parents=True, exist_ok=True)
            shutil.copy(o, folder / part / parent_label(o))
    return folder


@pytest.fixture(scope='session')
def make_dls(digits):
    "Few labelled digits and a few to validate on, fresh for each test"
    labeled, rest = split_labeled(digits, parent_label, 20, seed=0)
    test, _ = split_labeled(rest, parent_label, 20, seed=0)

    def make(bs=4, n_batches=3, item_tfms=None, batch_tfms=None, img_cls=PILImageBW, num_workers=0):
        set_seed(0)
        block = DataBlock(
            blocks=(ImageBlock(img_cls), CategoryBlock),
            get_y=parent_label,
            splitter=IndexSplitter(range(len(labeled), len(labeled) + len(test))),
            item_tfms=item_tfms,
            batch_tfms=batch_tfms,
        )
        dls = block.dataloaders(labeled + test, bs=bs, val_bs=len(test), num_workers=num_workers)
        return dls if n_batches is None else dls.repeat_train(n_batches)

    return make


@pytest.fixture
def undrawn(monkeypatch):
    "Figures are made as ever, but a blank image is saved: drawing is half of the time that a run takes"
    blank = Image.new('RGB', (8, 8))
    monkeypatch.setattr(Figure, 'savefig', lambda self, file, **kwargs: blank.save(file, format='png'))


@pytest.fixture
def make_learner(make_dls, pool, tmp_path):
    "A learner with FixMatch, three steps an epoch"

    def make(
        dls=None,
        model=None,
        fixmatch=None,  # Arguments of `FixMatch`
        loader=None,  # Unlabelled images; default: `pool`
        mu=2,
        label_func=parent_label,
        num_workers=0,
        cbs=(),
        **kwargs,
    ):
        dls = make_dls() if dls is None else dls
        if loader is None:
            tfm = FixMatchTransform(weak=weak_augment(flip=False))
            loader = dls.unlabeled_dl(pool, mu=mu, tfm=tfm, label_func=label_func, num_workers=num_workers)
        set_seed(0)
        fm = FixMatch(loader, **{'threshold': 0.2, **(fixmatch or {})})
        return Learner(dls, model or tiny_net(), **{'metrics': accuracy, 'path': tmp_path, 'cbs': [fm, *cbs], **kwargs})

    return make


@pytest.fixture
def make_student(tmp_path):
    "A fresh tiny network for `dls`"
    return lambda dls: Learner(dls, tiny_net(), metrics=accuracy, path=tmp_path)


@pytest.fixture(scope='session')
def teacher_weights(make_dls):
    "Of a tiny network that knows some of the digits"
    set_seed(0)
    learn = Learner(make_dls(n_batches=20), tiny_net())
    quiet_fit(learn, 2, 1e-2)
    return learn.model.state_dict()


@pytest.fixture
def teacher(make_dls, make_student, teacher_weights):
    learn = make_student(make_dls(n_batches=20))
    learn.model.load_state_dict(teacher_weights)
    return learn


@pytest.fixture
def photo():
    "A colourful image without symmetry"
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
