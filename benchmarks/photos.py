"""Few labels on a pretrained network: what unlabelled photos are worth, and what plain FixMatch makes of them.

    python benchmarks/photos.py --images trashnet-160.tar scenes-128.tar --weights mobilenetv2_100.safetensors
        the table: a night on two cores
    python benchmarks/photos.py ... --device cuda --processes 14
        the same in minutes, on a GPU with 16 cores
    python benchmarks/photos.py ... --only probe labels recipe --labels 4 --seeds 1
        some of it
    python benchmarks/photos.py ... --search
        how the recipe's defaults were found

A set of photos is a folder with a folder for each class, or such a folder in a tar. Images whose names begin with test_
are test images; where there are none, 600 are, equally many of each class, chosen once. `--search` sees training images
alone: of these it holds a fifth out. Each run goes to photos.csv as it ends; what is there is not run again. At the end
photos.md and photos.png are written.
"""

import argparse
import itertools
import json
import os
import platform
import random
import re
import tarfile
import time
import warnings
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS'):
    os.environ.setdefault(name, '1')  # before numpy is imported, in each process
warnings.filterwarnings('ignore')  # before fastai is imported

import fastai  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
from fastai.vision.all import (  # noqa: E402
    Callback,
    CategoryBlock,
    DataBlock,
    ImageBlock,
    IndexSplitter,
    L,
    OptimWrapper,
    ParamScheduler,
    Resize,
    SchedCos,
    accuracy,
    combine_scheds,
    get_image_files,
    nn,
    parent_label,
    set_seed,
    vision_learner,
)
from PIL import Image  # noqa: E402
from runs import add_run, read_runs  # noqa: E402

from fixmatch_fastai.all import (  # noqa: E402
    AlignedLabels,
    DebiasMatch,
    FixedThreshold,
    FixMatch,
    FixMatchTransform,
    FlexMatch,
    FreeMatch,
    FrozenBatchNorm,
    ModelEMA,
    SoftMatch,
    WeakTransform,
    probe,
    probe_head,
    pseudo_label,
    split_labeled,
    strong_augment,
    weak_augment,
    with_pseudo_labels,
)

HERE = Path(__file__).parent
COLUMNS = ['images', 'labels', 'arm', 'seed', 'steps', 'accuracy', 'seconds', 'n_test', 'pool']
COLUMNS += ['mask_rate', 'pseudo_acc', 'options', 'hardware']


# --- photos


def unpacked(source, store, size):
    "The photos of a folder or tar in class folders under `store`, the shorter side `size` pixels, written once"
    name = source.name.removesuffix('.tar')
    target = store / f'{name}-at-{size}'
    if target.exists():
        return target
    if source.suffix == '.tar':
        if not (store / name).exists():
            with tarfile.open(source) as f:
                f.extractall(store / name, filter='data')
        source = store / name
    partial_ = store / f'{name}-{os.getpid()}'
    for file in get_image_files(source):
        img = Image.open(file).convert('RGB')
        scale = size / min(img.size)
        img = img.resize([max(size, round(o * scale)) for o in img.size], Image.Resampling.BILINEAR)
        to = partial_ / file.parent.name / f'{file.stem}.bmp'
        to.parent.mkdir(parents=True, exist_ok=True)
        img.save(to)
    partial_.rename(target)
    return target


@cache
def parts(folder, search):
    "`(train, test)`: files; for a search both are of the training images"
    files = get_image_files(folder).sorted()
    test = files.filter(lambda o: o.name.startswith('test_'))
    if not test:
        test, _ = split_labeled(files, parent_label, 600 // n_classes(files) * n_classes(files))
    train = L(sorted(set(files) - set(test)))
    if not search:
        return train, test
    rng, by_class = random.Random(1), {}
    for o in train:
        by_class.setdefault(parent_label(o), []).append(o)
    held_out = {o for v in by_class.values() for o in rng.sample(v, len(v) // 5)}
    return train.filter(lambda o: o not in held_out), L(sorted(held_out))


def n_classes(files):
    return len({parent_label(o) for o in files})


# --- arms


# fastai's Adam takes these steps too, in some two thousand small operations each: on a GPU that many processes share
# they are what takes time
adam = partial(OptimWrapper, opt=torch.optim.AdamW, betas=(0.9, 0.99), eps=1e-5, weight_decay=0.01)


class Photos:
    "One set of photos with some labels: makes the learner and the pool, alike for all arms"

    def __init__(self, args, folder, n_each, seed, search=False):
        self.args, self.seed = args, seed
        train, self.test = parts(folder, search)
        self.labeled, _ = split_labeled(train, parent_label, n_each * n_classes(train), seed + 1000 * search)
        self.pool = train  # with the labelled images, as in the paper

    def learner(self, bs=8, epoch=30, draw=0, **kwargs):
        set_seed(self.seed + 1000 * draw)
        items = self.labeled + self.test
        block = DataBlock(
            blocks=(ImageBlock, CategoryBlock),
            get_y=parent_label,
            splitter=IndexSplitter(range(len(self.labeled), len(items))),
            item_tfms=[Resize(self.args.size), WeakTransform(weak_augment())],
        )
        dls = block.dataloaders(items, bs=bs, val_bs=100, num_workers=0, device=self.args.device).repeat_train(epoch)
        opts = dict(pretrained_cfg_overlay=dict(file=str(self.args.weights))) if self.args.weights else {}
        if self.args.network.startswith('mobilenetv2'):
            opts['pad_type'] = 'same'
        learn = vision_learner(dls, self.args.network, metrics=accuracy, opt_func=adam, **kwargs, **opts)
        learn.recorder.add_time = False
        learn.model.to(memory_format=torch.channels_last)  # the same numbers, on a CPU in two thirds of the time
        return learn

    def unlabeled_dl(self, dls, mu=4, strong='timm', cutout=True):
        weak = weak_augment()
        strong = weak if strong == 'weak' else strong_augment(strong, weak)
        if not cutout:
            strong.cutout = Image.Image.copy  # as it is
        tfm = FixMatchTransform(weak=weak, strong=strong)
        return dls.unlabeled_dl(self.pool, mu=mu, tfm=tfm, label_func=parent_label, cache=True, num_workers=0)


def quiet(learn, fit):
    with learn.no_bar(), learn.no_logging():
        fit()
    return learn


def judged(learn):
    with learn.no_bar(), learn.no_logging():
        return float(learn.validate()[1])


class Light(Callback):
    "Trains of the body nothing but weights and biases of BatchNorm"

    order = -50

    def before_fit(self):
        self.model[0].requires_grad_(False)
        for m in self.model[0].modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.requires_grad_(True)


def recipe(
    photos,
    steps=300,
    policy='aligned',
    half_life=None,
    bs=8,
    mu=4,
    strong='timm',
    cutout=True,
    light=False,
    n_epoch=1,
    **kwargs,
):
    "`learn.fine_tune_fixmatch`, with any of its settings"
    learn = photos.learner(bs)
    pool = photos.unlabeled_dl(learn.dls, mu, strong, cutout)
    if half_life:
        kwargs['teacher'] = ModelEMA(half_life=half_life)
    fit = partial(learn.fine_tune_fixmatch, pool, steps, policy=POLICIES[policy](), n_epoch=n_epoch, **kwargs)
    quiet(learn, partial(fit, cbs=[Light()] * light))
    return found(learn)


def snippet(photos, steps=300, bs=8, mu=4):
    "What the README shows: `FixMatch` among the callbacks, and `fit_one_cycle`"
    learn = photos.learner(bs, epoch=steps // 3)
    pool, teacher = photos.unlabeled_dl(learn.dls, mu), ModelEMA(half_life=40)
    fix_match = FixMatch(pool, policy=AlignedLabels(), teacher=teacher, warmup=0.4)
    learn.add_cbs([fix_match, FrozenBatchNorm()])
    probe_head(learn)
    learn.unfreeze()
    quiet(learn, partial(learn.fit_one_cycle, 3, slice(3e-5, 1e-4)))
    return found(learn)


def found(learn):
    "Accuracy at the end, and what became of the pseudo-labels of the last steps"
    history = learn.fix_match.history.tail(50)
    return dict(accuracy=judged(learn), mask_rate=history.mask_rate.mean(), pseudo_acc=history.pseudo_acc.mean())


def labels_alone(photos, **kwargs):
    "The recipe without the pool: from the probe's head, BatchNorm frozen, weights averaged"
    return dict(accuracy=judged(tuned(photos, **kwargs)))


def tuned(photos, steps=300, bs=8, base_lr=3e-4, body_lr=0.3, half_life=None, light=False, table=None, draw=0, **_):
    "A learner trained that way, on the labels and, if there is one, a table of pseudo-labels, in batches of 8 and 32"
    learn = photos.learner(bs, epoch=steps, draw=draw)
    probe_head(learn)
    learn.unfreeze()
    if table is not None:
        learn.dls = with_pseudo_labels(learn.dls, table, mu=4, strong=strong_augment(), bs=5 * bs).repeat_train(steps)
    lrs = base_lr * np.array([body_lr] * (len(learn.opt.param_lists) - 1) + [1.0])
    rise_and_fall = combine_scheds([0.25, 0.75], [SchedCos(0.1, 1.0), SchedCos(1.0, 0.01)])
    cycle = ParamScheduler({'lr': partial(scaled, rise_and_fall, lrs)})
    average = ModelEMA(half_life=half_life or max(1, steps / 8))
    quiet(learn, partial(learn.fit, 1, cbs=[average, FrozenBatchNorm(), cycle] + [Light()] * light))
    return learn


def self_training(photos, steps=300, n_learners=0, share=0.25):
    "On the labels and the surest pseudo-labels of each class, of the probe or of the mean of several learners"
    if n_learners:
        learners = [tuned(photos, steps=steps // 2, draw=1 + i) for i in range(n_learners)]
    else:
        learners = [photos.learner()]
        probe_head(learners[0])
    tables = []
    for learn in learners:
        with learn.no_bar():
            tables.append(pseudo_label(learn, photos.pool, soft=True, num_workers=0))
    vocab = np.array(learners[0].dls.vocab)
    probs = np.mean([o.filter(like='prob_') for o in tables], axis=0)
    table = tables[0][['file']].assign(predicted=vocab[probs.argmax(1)], confidence=probs.max(1).astype('float32'))
    each = round(share * len(photos.pool) / len(vocab))
    table = table.sort_values('confidence', ascending=False).groupby('predicted').head(each)
    accuracy = judged(tuned(photos, steps=steps, table=table))
    right = (table.predicted == table.file.map(parent_label)).mean()
    return dict(accuracy=accuracy, mask_rate=len(table) / len(photos.pool), pseudo_acc=right)


def scaled(sched, lr, pos):
    return lr * sched(pos)


def fine_tuned(photos, steps=300, policy=None, bs=8, mu=4, **_):
    "fastai's own `fine_tune`, with `FixMatch` among the callbacks where there is a policy"
    learn = photos.learner(bs, epoch=steps // 10)
    if policy:
        learn.add_cb(FixMatch(photos.unlabeled_dl(learn.dls, mu), policy=PLAIN[policy]()))
    quiet(learn, partial(learn.fine_tune, 9))
    return found(learn) if policy else dict(accuracy=judged(learn))


def probed(photos, steps=300, **_):
    return dict(accuracy=probe(photos.learner()).accuracy)


POLICIES = {
    'aligned': AlignedLabels,
    'aligned 0.6': partial(AlignedLabels, 0.6),
    'aligned 0.7': partial(AlignedLabels, 0.7),
    'aligned 0.9': partial(AlignedLabels, 0.9),
    'aligned T 1': partial(AlignedLabels, T=1.0),
    'aligned T 0.25': partial(AlignedLabels, T=0.25),
    'aligned decay 0.99': partial(AlignedLabels, decay=0.99),
    'fixed 0.8': partial(FixedThreshold, 0.8),
    'flexmatch': FlexMatch,
    'freematch': partial(FreeMatch, decay=0.95),
    'softmatch': partial(SoftMatch, decay=0.95),
    'debiasmatch': partial(DebiasMatch, 0.8, decay=0.95),
    'debiasmatch margin': partial(DebiasMatch, 0.8, decay=0.95, margin=True),
}
PLAIN = dict(fixmatch=FixedThreshold, flexmatch=FlexMatch, freematch=FreeMatch, softmatch=SoftMatch)
PLAIN['debiasmatch'] = DebiasMatch
ARMS = {
    'probe': probed,
    'labels, fine_tune': fine_tuned,
    'labels, probe head': labels_alone,
    **{f'plain {name}': partial(fine_tuned, policy=name) for name in PLAIN},
    'self-training, probe': self_training,
    'self-training, 3 learners': partial(self_training, n_learners=3),
    'snippet': snippet,
    'recipe': recipe,
    **{f'recipe, {name}': partial(recipe, policy=name) for name in POLICIES if name != 'aligned'},
}

# What was tried for the recipe's defaults, in this order
LOW = dict(base_lr=1e-4)
TRIALS = [
    ('labels_alone', LOW),
    ('recipe', LOW),
    ('recipe', dict(LOW, half_life=75)),
    ('recipe', dict(LOW, policy='fixed 0.8')),
    ('recipe', dict(LOW, warmup=0.6)),
    ('recipe', dict(LOW, lambda_u=0.3)),
    ('recipe', dict(light=True, base_lr=1e-3, body_lr=1.0)),
    ('labels_alone', {}),
    ('recipe', {}),
    ('recipe', dict(LOW, steps=600)),
    ('labels_alone', dict(LOW, steps=600)),
    ('recipe', dict(LOW, policy='debiasmatch')),
    ('recipe', dict(LOW, strong='google')),
    ('recipe', dict(LOW, cutout=False)),
    ('recipe', dict(LOW, strong='weak')),
    ('recipe', dict(LOW, warmup=0.2)),
    ('recipe', dict(LOW, policy='aligned 0.6')),
    ('recipe', dict(LOW, policy='aligned T 1')),
    ('recipe', dict(LOW, mu=2)),
    ('recipe', dict(LOW, mu=7)),
]


# --- runs


def hardware(device):
    name = torch.cuda.get_device_name() if device == 'cuda' else platform.machine()
    if device == 'cpu' and (info := Path('/proc/cpuinfo')).exists():
        name = re.search(r'model name\s*:\s*(.*)', info.read_text())[1] + ', one thread'
    versions = [f'{o.__name__} {o.__version__.split("+")[0]}' for o in (torch, fastai, timm)]
    return f'{name}; {", ".join([f"Python {platform.python_version()}", *versions])}'


def run(args, source, n_each, arm, seed, options):
    "One run, as a row"
    torch.set_num_threads(1)
    start = time.perf_counter()
    folder = unpacked(source, args.store, args.size)
    photos = Photos(args, folder, n_each, seed, args.search)
    func = dict(recipe=recipe, labels_alone=labels_alone)[arm] if args.search else ARMS[arm]
    result = func(photos, **{'steps': args.steps, **options})
    row = dict(images=source.name.removesuffix('.tar'), labels=n_each, arm=arm, seed=seed)
    row['steps'] = options.get('steps', args.steps)
    row |= {k: round(float(v), 4) for k, v in result.items()}
    row |= dict(seconds=round(time.perf_counter() - start, 1), n_test=len(photos.test), pool=len(photos.pool))
    return row | dict(options=json.dumps(options), hardware=hardware(args.device))


def key(images, labels, arm, seed, steps, options):
    "What tells a run from others"
    return images, int(labels), arm, int(seed), int(steps), options


def done_before(file):
    columns = ['images', 'labels', 'arm', 'seed', 'steps', 'options']
    return {key(*o) for o in read_runs(file, COLUMNS)[columns].itertuples(index=False)}


def todo(args):
    for arm, options in TRIALS if args.search else [(o, {}) for o in args.only]:
        for n_each in args.labels:
            for source in args.images:
                for seed in range(args.seeds):
                    yield source, n_each, arm, seed, options


# --- the page

ABOUT = """# Photos, measured

`make bench-photos` prints this page; every run is a line of `benchmarks/photos.csv`. A pretrained network, a few
labelled photos of each class, and the other training photos as a pool: what do they add to the labels, by which way?

{ways}

All ways take the same number of steps, of 8 labelled and, with the pool, 32 unlabelled photos; fastai's default head of
two layers; the views of `FixMatchTransform`; photos of 96 pixels. The optimiser is fastai's Adam, or torch's AdamW with
its settings, which takes the same steps in fewer operations. Test photos were used for nothing but this table. Ways
that have no row have not been run.

![Accuracy over the number of labels](photos.png)
"""
WAYS = {
    'probe': "a logistic regression on the frozen body's features, `probe(learn)`: a second of work",
    'labels, fine_tune': "the labels alone, with fastai's `learn.fine_tune` and its defaults",
    'labels, probe head': 'the labels alone, with all that the recipe has but the pool: the probe as the head, '
    'BatchNorm frozen, small learning rates, averaged weights',
    'plain FixMatch and others': '`FixMatch(unlabeled_dl)` among the callbacks of `learn.fine_tune`, with that '
    "policy's defaults",
    'self-training': 'on the labels and a table of pseudo-labels, which stay as they are: the surest of each class, '
    'a quarter of the pool, of the probe or of the mean of three learners on the labels alone (half as many steps '
    'each, on top); then as *labels, probe head*, with strong views',
    'snippet': "the README's first lines: `FixMatch` with a teacher and a warm-up, and `fit_one_cycle`",
    'recipe': '`learn.fine_tune_fixmatch(unlabeled_dl)` with its defaults',
    'recipe, another policy': 'the same with that policy',
}


def markdown(columns, rows):
    return [f'| {" | ".join(o)} |' for o in [columns, ['---'] * len(columns), *rows]]


def pm(o):
    return f'{100 * o.mean():.1f}' + (f' ± {100 * o.std():.1f}' if len(o) > 1 else ', one seed')


ACCURACY = (
    '{steps} steps, {counts}; accuracy in %, mean ± standard deviation over seeds; in brackets the gain over the '
    'better of both ways with labels alone, on the same seeds.'
)


def table(rows, tried=None):
    "Markdown: for each set of photos a row for each way, a column for each number of labels, and the gain of the pool"
    text = [ABOUT.format(ways='\n'.join(markdown(['way', 'what it is'], WAYS.items())))]
    for (images, steps), part in rows.groupby(['images', 'steps'], sort=True):
        labels = sorted(part.labels.unique())
        counts = f'{part.n_test.iloc[0]} test photos, a pool of {part["pool"].iloc[0]:,}'
        text += [f'## {images}', '', ACCURACY.format(steps=steps, counts=counts), '']
        arms = [o for o in ARMS if o in set(part.arm)]
        lines = [[arm, *(cell(part[part.labels == n], arm) for n in labels)] for arm in arms]
        text += [*markdown(['way', *(f'{o} labels a class' for o in labels)], lines), '']
    by_hardware = rows.groupby('hardware')
    where = [f'{", ".join(o for o in ARMS if o in set(part.arm))}: {name}' for name, part in by_hardware]
    text += ['*' + '. '.join(where) + '.*', '']
    return '\n'.join(text + ([] if tried is None else searched(tried))).rstrip() + '\n'


def searched(rows):
    "Markdown: what was tried for the defaults, on photos held out of the training photos"
    by_set = {name: part for name, part in rows.groupby('images')}
    labels = sorted(rows.labels.unique())
    counts = [
        f'{name}: {part.n_test.iloc[0]} photos held out, a pool of {part["pool"].iloc[0]:,}'
        for name, part in by_set.items()
    ]
    text = [
        '## How the defaults were found',
        '',
        '`make bench-photos ARGS="--search ..."`: on training photos alone, of which a fifth is held out; mean '
        f'accuracy in % over the seeds. {"; ".join(counts)}.',
        '',
    ]
    lines = []
    for (arm, steps, options), o in rows.groupby(['arm', 'steps', 'options'], sort=False):
        means = [100 * o[(o.images == i) & (o.labels == n)].accuracy.mean() for i in by_set for n in labels]
        settings = [f'{k}={v}' for k, v in json.loads(options).items() if k != 'steps'] or ['nothing']
        settings += [f'{steps} steps'] * (steps != 300)
        name = 'labels alone' if arm == 'labels_alone' else 'recipe'
        lines.append([f'{name}: {", ".join(settings)}', str(len(o)), *(f'{m:.1f}' for m in [*means, np.mean(means)])])
    lines.sort(key=lambda o: o[0].partition(':')[0])
    what = 'what differs from the defaults of the time (300 steps, base_lr 0.0003)'
    text += markdown([what, 'runs', *(f'{o}, {n} labels' for o in by_set for n in labels), 'mean'], lines)
    return text + ['', '*' + '; '.join(sorted(rows.hardware.unique())) + '*']


def cell(part, arm):
    mine = part[part.arm == arm].set_index('seed').accuracy
    if not len(mine):
        return '–'
    alone = part[part.arm.str.startswith('labels')].groupby('arm').accuracy.mean()
    if not len(alone) or arm.startswith('labels'):
        return f'{pm(mine)}'
    diff = (mine - part[part.arm == alone.idxmax()].set_index('seed').accuracy).dropna()
    return f'{pm(mine)} ({100 * diff.mean():+.1f})' if len(diff) else pm(mine)


def picture(rows, file):
    "Accuracy of the main ways over the number of labels, one panel for each set"
    import matplotlib

    matplotlib.use('agg')
    import matplotlib.pyplot as plt

    main = {'recipe': 'C0', 'snippet': 'C9', 'labels, probe head': 'C2'}
    main |= {'probe': 'C7', 'plain fixmatch': 'C3', 'labels, fine_tune': 'C1'}
    sets = sorted(rows.images.unique())
    fig, axs = plt.subplots(1, len(sets), figsize=(4.2 * len(sets), 3.4), layout='constrained', squeeze=False)
    for ax, images in zip(axs[0], sets):
        part = rows[rows.images == images]
        labels = sorted(part.labels.unique())
        for i, (arm, color) in enumerate(main.items()):
            o = 100 * part[part.arm == arm].groupby('labels').accuracy.agg(['mean', 'std'])
            if len(o):
                xs = [labels.index(n) + 0.04 * (i - 2.5) for n in o.index]
                style = dict(color=color, marker='o', ms=4, lw=1.5, elinewidth=0.8)
                ax.errorbar(xs, o['mean'], yerr=o['std'].fillna(0), label=arm, **style)
        ax.set(title=images, xlabel='labelled photos of each class')
        ax.set_xticks(range(len(labels)), labels)
        ax.grid(alpha=0.3)
    axs[0, 0].set_ylabel('test accuracy, %')
    handles, names = axs[0, 0].get_legend_handles_labels()
    fig.legend(handles, names, loc='outside lower center', ncols=6, frameon=False, fontsize=8)
    fig.savefig(file, dpi=100)


def write(out):
    "The page and its picture, of the runs in photos.csv"
    rows, search = pd.read_csv(out / 'photos.csv'), out / 'photos_search.csv'
    (out / 'photos.md').write_text(table(rows, pd.read_csv(search) if search.exists() else None), encoding='utf-8')
    picture(rows, out / 'photos.png')


def results(args, left, start):
    "Rows of the runs in `left`, as they end"
    in_time = (o for o in left if time.monotonic() - start < 60 * args.minutes)
    if args.processes == 1:
        yield from (run(args, *o) for o in in_time)
        return
    with ProcessPoolExecutor(args.processes, get_context('spawn')) as pool:
        running = {pool.submit(run, args, *o) for o in itertools.islice(in_time, args.processes)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            running |= {pool.submit(run, args, *o) for o in itertools.islice(in_time, len(done))}
            yield from (o.result() for o in done)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=Path, nargs='+', required=True, help='folders or tars of class folders')
    parser.add_argument('--network', default='mobilenetv2_100', help='any of timm')
    parser.add_argument('--weights', type=Path, help='safetensors file of its weights (default: downloaded)')
    parser.add_argument('--size', type=int, default=96, help='side of what the network sees, in pixels')
    parser.add_argument('--labels', type=int, nargs='+', default=[4, 8, 25], help='labelled photos of each class')
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--steps', type=int, default=300)
    parser.add_argument('--only', nargs='+', default=list(ARMS), choices=list(ARMS), metavar='ARM')
    parser.add_argument('--search', action='store_true', help='try settings of the recipe, on training images alone')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--processes', type=int, default=2, help='runs beside each other, of one thread each')
    parser.add_argument('--minutes', type=float, default=1e9, help='begin no run after that')
    parser.add_argument('--store', type=Path, default=Path('photos'), help='where unpacked photos are kept')
    parser.add_argument('--out', type=Path, default=HERE)
    args = parser.parse_args(argv)
    start = time.monotonic()
    file = args.out / ('photos_search.csv' if args.search else 'photos.csv')
    for o in args.images:
        unpacked(o, args.store, args.size)
    done = done_before(file)

    def key_of(source, n_each, arm, seed, options):
        steps = options.get('steps', args.steps)
        return key(source.name.removesuffix('.tar'), n_each, arm, seed, steps, json.dumps(options))

    left = [o for o in todo(args) if key_of(*o) not in done]
    print(f'{len(left)} runs to do, {len(done)} done before', flush=True)
    for n, row in enumerate(results(args, left, start), 1):
        add_run(file, COLUMNS, row)
        which = '{images} {labels} {arm} {options} seed {seed}'.format(**row)
        print(f'{n}/{len(left)} {which}: {100 * row["accuracy"]:.1f} % in {row["seconds"]:.0f} s', flush=True)
    if not args.search:
        write(args.out)


if __name__ == '__main__':
    main()
