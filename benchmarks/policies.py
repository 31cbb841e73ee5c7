"""Which pseudo-labels count: supervised training and every policy on the same few labels, with equal steps.

Every run is a line in policies.csv, so that an interrupted benchmark goes on where it was; policies.md is its table.
"""

import argparse
import os
import platform
import time
import warnings
from pathlib import Path

warnings.filterwarnings('ignore', category=FutureWarning)  # before fastai is imported

import fastai
import pandas as pd
import torch
from fastai.vision.all import get_image_files
from few_labels import FewLabels
from runs import add_run, read_runs

from fixmatch_fastai.all import (
    UDA,
    AdaMatch,
    Dash,
    DebiasMatch,
    FixedThreshold,
    FlexMatch,
    FreeMatch,
    SoftMatch,
    digits_path,
)
from fixmatch_fastai.uncertainty import FeatureDensity, MCDropout, ScoreThreshold, add_dropout, entropy, mutual_info

HERE = Path(__file__).parent
COLUMNS = 'images labels steps mu method seed accuracy mask_rate pseudo_acc cpu_seconds n_test hardware'.split()

ABOUT = """# Policies, measured

`make bench-policies` prints this page; every run is a line of `benchmarks/policies.csv`. The digits come with
scikit-learn; CIFAR-10, from a folder of images in class folders, is measured by `make bench-policies ARGS="--images
cifar10/train --name CIFAR-10 --labels 250 --seeds 2 --mu 4 --steps 300"`, with `--steps 2000 --only supervised
FixMatch FlexMatch SoftMatch` for the last table (the two tables of CIFAR-10 are from before RandAugment kept to
bilinear interpolation, when it drew bicubic by chance too). All methods get the same labels, starting weights and
number of steps: a network of two convolutions, Adam with one cycle up to a learning rate of 0.01, the weak view for
labelled images, `timm`'s RandAugment and Cutout for the strong view. The pool holds the labelled images too.

Settings are the defaults, except for what counts steps, which is fitted to runs as short as these: running averages
with a decay of 0.99, Dash with a warm-up of 10 % of the steps and a fall at every 1 %. *entropy* is
`ScoreThreshold(entropy, 0.2)`, *mutual information* `FixedThreshold() & MCDropout(mutual_info, 0.02, 5)` with
dropout of 0.3 before the classifier, *feature density* `FixedThreshold() & FeatureDensity()`. The network and the
learning rate are those of `make demo`, which were settled by looking at supervised training and FixMatch with 40
digits; nothing else was chosen by such results. The seconds are processor time of the training process; views are
made in another.

Runs as short as these say how methods start, not how they end; for that see [the published
numbers](../nbs/02_policy.ipynb#which-policy-when).
"""


def policies(steps):
    "Defaults of the papers, but averages over about 100 steps, and Dash's rates in percent of all: runs are short"
    decay = 0.99
    return {
        'supervised': None,
        'FixMatch': FixedThreshold(),
        'UDA': UDA(),
        'FlexMatch': FlexMatch(),
        'FreeMatch': FreeMatch(decay=decay),
        'SoftMatch': SoftMatch(decay=decay),
        'AdaMatch': AdaMatch(decay=decay),
        'Dash': Dash(warmup=steps // 10, every=max(1, steps // 100)),
        'DebiasMatch': DebiasMatch(decay=decay),
        'entropy': ScoreThreshold(entropy, at_most=0.2),
        'mutual information': FixedThreshold() & MCDropout(mutual_info, at_most=0.02, n_passes=5),
        'feature density': FixedThreshold() & FeatureDensity(),
    }


def hardware():
    cpuinfo = Path('/proc/cpuinfo')
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = next((o.split(':')[1].strip() for o in lines if 'model name' in o), '') or platform.machine()
    versions = dict(Python=platform.python_version(), torch=torch.__version__.split('+')[0], fastai=fastai.__version__)
    return ', '.join([cpu, *(f'{name} {version}' for name, version in versions.items())])


def run(comparison, images, method, policy, seed):
    "Train once; returns the line of the table"
    learn = comparison.learner(seed, semi=policy is not None)
    if policy is not None:
        learn.fix_match.policy = policy
    if method == 'mutual information':
        add_dropout(learn.model, 0.3)
    start = time.process_time()
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, comparison.lr)
    seconds = time.process_time() - start  # of this process: other work on the machine does not count
    late = learn.fix_match.history.tail(max(1, comparison.steps // 10)).mean() if policy is not None else {}
    row = dict(
        images=images, labels=comparison.n_labels, steps=comparison.steps, mu=comparison.mu, method=method, seed=seed
    )
    row |= dict(accuracy=learn.recorder.values[-1][2], n_test=len(comparison.test), hardware=hardware())
    row |= dict(mask_rate=late.get('mask_rate'), pseudo_acc=late.get('pseudo_acc'), cpu_seconds=seconds)
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}


def in_order(rows):
    "Digits first, few labels and steps first, methods as in `policies`"
    rows = rows.sort_values('method', key=lambda s: s.map(list(policies(1)).index), kind='stable')
    return rows.sort_values(['images', 'labels', 'steps'], ascending=[False, True, True], kind='stable')


def mean_and_std(values, scale=1, digits=0):
    if values.isna().any():
        return '–'
    spread = f' ± {scale * values.std():.{digits}f}' if len(values) > 1 else ''
    return f'{scale * values.mean():.{digits}f}{spread}'


def table(rows):
    "Markdown: a table for each set of images and number of labels"
    text = ['\n\n'.join(' '.join(paragraph.split()) for paragraph in ABOUT.split('\n\n')), '']
    for (images, labels, steps, mu), part in rows.groupby(['images', 'labels', 'steps', 'mu'], sort=False):
        seeds = part.groupby('method').seed.nunique().min()
        text += [
            f'## {images}, {labels} labels, {steps:,} steps',
            '',
            f'{steps:,} steps of 16 labelled and {16 * mu} unlabelled images, {seeds} seed{"s" if seeds > 1 else ""}, '
            f'{part.n_test.iloc[0]} test images; mean ± standard deviation. '
            '`mask_rate` and `pseudo_acc` over the last tenth of the steps. '
            f'{part.hardware.iloc[-1]}, one thread.',
            '',
            '| method | accuracy, % | gain over supervised, same seeds | mask_rate | pseudo_acc | CPU seconds |',
            '| --- | --- | --- | --- | --- | --- |',
        ]
        base = part[part.method == 'supervised'].set_index('seed').accuracy
        for method, o in part.groupby('method', sort=False):
            gain = o.set_index('seed').accuracy - base if method != 'supervised' else pd.Series([float('nan')])
            accuracies = mean_and_std(o.accuracy, 100, 1), mean_and_std(gain, 100, 1)
            rates = mean_and_std(o.mask_rate, digits=2), mean_and_std(o.pseudo_acc, digits=3)
            text.append(f'| {method} | {" | ".join(accuracies + rates)} | {o.cpu_seconds.mean():.0f} |')
        text.append('')
    return '\n'.join(text).rstrip() + '\n'


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument('--images', type=Path, help='a folder of images in class folders (default: the digits)')
    p.add_argument('--name', help="what the table calls them (default: the folder's name)")
    p.add_argument('--labels', type=int, nargs='+', default=[20, 40], help='numbers of labelled images')
    p.add_argument('--n-test', type=int, help='test images (default: 400 digits, or a quarter of --images)')
    p.add_argument('--steps', type=int, default=400, help='training steps of every method')
    p.add_argument('--seeds', type=int, default=3, help='how many times, with other labels and starting weights')
    p.add_argument('--mu', type=int, default=7, help='unlabelled images for each labelled one')
    p.add_argument('--only', nargs='+', help='methods to run (default: all)')
    p.add_argument('--workers', type=int, default=1, help='processes that make views')
    p.add_argument('--out', type=Path, default=HERE, help='where policies.csv and policies.md go')
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / 'policies.csv'
    images = args.name or (args.images.name if args.images else 'digits')
    unknown = set(args.only or []) - set(policies(1))
    if unknown:
        p.error(f'there is no method {sorted(unknown)}: use any of {list(policies(1))}')
    files = get_image_files(args.images or digits_path()).sorted()
    opts = dict(n_test=args.n_test, size=32) if args.images else dict(n_test=args.n_test or 400, flip=False)
    opts |= dict(steps=args.steps, mu=args.mu, num_workers=args.workers)
    for labels in args.labels:
        comparison = FewLabels(files, labels, **opts)
        for seed in range(args.seeds):
            for method in args.only or policies(1):
                done = read_runs(results, COLUMNS)
                settings = dict(images=images, labels=labels, steps=args.steps, mu=args.mu, method=method, seed=seed)
                if (done[list(settings)] == pd.Series(settings)).all(axis=1).any():
                    continue
                row = run(comparison, images, method, policies(args.steps)[method], seed)
                add_run(results, COLUMNS, row)
                accuracy, seconds = f'{100 * row["accuracy"]:5.1f} %', f'{row["cpu_seconds"]:5.1f} s'
                print(f'{images}, {labels} labels, seed {seed}: {method:<20}{accuracy}  {seconds}', flush=True)
    text = table(in_order(pd.read_csv(results)))
    new = args.out / f'policies.md.{os.getpid()}'
    new.write_text(text)
    os.replace(new, args.out / 'policies.md')
    print(f'\n{text}')


if __name__ == '__main__':
    main()
