"""How fast: views, steps, and how they grow.

Ratios of medians of runs that take turns, so that a busy machine slows all of them alike.

make bench                          on the CPU: all but the accuracies take about ten minutes on one core
make bench ARGS="--only steps"      one table; the others stay as they are
make bench ARGS="--device cuda"     on a GPU, with WRN-28-2 in bf16 at 64 labelled images and mu 7
"""

import argparse
import gc
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

warnings.filterwarnings('ignore')  # before fastai is imported

import fastai
import numpy as np
import PIL
import timm
import torch
import torch.nn.functional as F
import torchvision.transforms as T
from fastai.vision.all import (
    Callback,
    CategoryBlock,
    CrossEntropyLossFlat,
    DataBlock,
    DataLoaders,
    ImageBlock,
    IndexSplitter,
    Learner,
    Normalize,
    OptimWrapper,
    PILImage,
    Resize,
    get_image_files,
    imagenet_stats,
    parent_label,
)
from few_labels import FewLabels
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data.auto_augment import rand_augment_transform

from fixmatch_fastai.all import (
    FixMatch,
    FixMatchBatchTransform,
    FixMatchTransform,
    ModelEMA,
    Policy,
    PseudoLabels,
    digits_path,
)
from fixmatch_fastai.core import replacing
from fixmatch_fastai.experiment.networks import wide_resnet
from fixmatch_fastai.opening import OpenImage

HERE = Path(__file__).parent
sgd = partial(OptimWrapper, opt=torch.optim.SGD, momentum=0.9)
FORWARDS = ['joint', 'split', 'selective']


def ratio(times, base):
    "Median over rounds of a method's time over the base's of the same round"
    return {k: statistics.median(a / b for a, b in zip(v, times[base])) for k, v in times.items()}


def in_turn(methods, rounds):
    "Seconds of each method in each round; the first round is not counted"
    times = {k: [] for k in methods}
    for r in range(rounds + 1):
        for k, f in methods.items():
            t = f()
            if r:
                times[k].append(t)
    return times


def wait(device):
    if device == 'cuda':
        torch.cuda.synchronize()


def row(*cells):
    return '| ' + ' | '.join(str(o) for o in cells) + ' |\n'


def table(head, rows):
    return row(*head) + row(*['---'] * len(head)) + ''.join(row(*o) for o in rows)


# --- views -----------------------------------------------------------------------------------------------------------


def photo(size, seed=0):
    "Something with colours, edges and texture"
    rng = np.random.default_rng(seed)
    img = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    img = img.resize((size, size), Image.Resampling.BICUBIC)
    noise = rng.integers(-20, 20, (size, size, 3))
    return Image.fromarray((np.array(img) + noise).clip(0, 255).astype(np.uint8))


class Plain:
    "The plain recipe of many tutorials: a flip, timm's RandAugment for one view, both normalised; no shift, no Cutout"

    def __init__(self, size):
        finish = [T.ToTensor(), T.Normalize(*imagenet_stats)]
        grey = dict(translate_const=int(size * 0.45), img_mean=(124, 116, 104))
        self.weak = T.Compose([T.RandomHorizontalFlip(), *finish])
        self.strong = T.Compose([T.RandomHorizontalFlip(), rand_augment_transform('rand-m9-mstd0.5', grey), *finish])

    def __call__(self, img):
        return self.weak(img), self.strong(img)


def one_by_one(tfm, imgs, n):
    start = time.process_time()
    for i in range(n):
        tfm(imgs[i % len(imgs)])
    return (time.process_time() - start) / n


def in_batches(tfm, x, times=1):
    wait(x.device.type)
    start = time.perf_counter()
    for _ in range(times):
        tfm(x)
    wait(x.device.type)
    return (time.perf_counter() - start) / times / len(x)


def bench_views(args):
    rows = []
    for size in (32, 96, 224):
        imgs = [photo(size, i) for i in range(16)]
        n, m = 200, {32: 448, 96: 112, 224: 28}[size]
        batch = torch.stack([torch.from_numpy(np.array(imgs[i % 16])).permute(2, 0, 1) for i in range(m)]).contiguous()
        methods = {
            'plain': partial(one_by_one, Plain(size), imgs, n),
            'workers': partial(one_by_one, FixMatchTransform(), imgs, n),
            'batch': partial(in_batches, FixMatchBatchTransform(), batch),
        }
        times = in_turn(methods, args.rounds * 3)
        to = ratio(times, 'plain')
        speed = {k: 1 / statistics.median(v) for k, v in times.items()}
        ratios = (f'{1 / to[k]:.2f}×' for k in ('workers', 'batch'))
        rows.append([f'{size} px', *(f'{speed[k]:,.0f}' for k in methods), *ratios])
        print(rows[-1], flush=True)
    head = ['', 'plain recipe', '`FixMatchTransform`', '`FixMatchBatchTransform`', 'ratio', 'ratio of the batch']
    text = table(head, rows) + (
        f'\nImages a second on one core, two views of each, medians of {3 * args.rounds} rounds; '
        'decoding and resizing left out. The plain recipe flips, applies RandAugment to one view and normalises both; '
        'ours shift and cut out besides, and leave normalising to the device.\n'
    )
    if args.device == 'cuda':
        text += f'\nOn the GPU, both views of 448 images of 32×32: {1e3 * views_of_448(args.device):.2f} ms.\n'
    return text


def views_of_448(device, times=20):
    "Seconds for both views of a batch of 448 images of 32×32 pixels"
    x = torch.randint(0, 256, (448, 3, 32, 32), dtype=torch.uint8, device=device)
    in_batches(FixMatchBatchTransform(), x, 5)
    return statistics.median(in_batches(FixMatchBatchTransform(), x, times) for _ in range(7)) * len(x)


# --- large photos ----------------------------------------------------------------------------------------------------

LARGE = 6000, 4000  # pixels
FILTERS = 'BICUBIC', 'LANCZOS'


def large_photo():
    "A photograph, enlarged, with noise as of a sensor"
    china = Image.fromarray(load_sample_image('china.jpg')).resize(LARGE, Image.Resampling.BICUBIC)
    noise = np.random.default_rng(0).integers(-12, 13, (*LARGE[::-1], 1))
    return Image.fromarray((np.asarray(china) + noise).clip(0, 255).astype(np.uint8))


def opened(create, file, resample=Image.Resampling.BILINEAR):
    "As validation sees it"
    return Resize(224, resamples=(resample, Image.Resampling.NEAREST))(create(file), split_idx=1)


def seconds_to_open(create, file):
    start = time.process_time()
    opened(create, file)
    return time.process_time() - start


def differ(a, b):
    "Mean and largest difference of two images"
    found = np.abs(np.asarray(a, dtype=float) - np.asarray(b))
    return f'{found.mean():.1f}, {found.max():.0f}'


def bench_large(args):
    whole, late = PILImage.create, OpenImage(PILImage)
    img, rows = large_photo(), []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / 'large.jpg'
        for quality, progressive in ((75, False), (90, False), (97, False), (90, True)):
            img.save(file, quality=quality, progressive=progressive)
            methods = {'whole': partial(seconds_to_open, whole, file), 'late': partial(seconds_to_open, late, file)}
            times = in_turn(methods, args.rounds)
            name = f'quality {quality}{", progressive" * progressive}, {file.stat().st_size / 1e6:.1f} MB'
            seconds = [f'{statistics.median(o):.2f} s' for o in times.values()]
            ours = opened(whole, file)
            others = opened(late, file), *(opened(whole, file, getattr(Image.Resampling, o)) for o in FILTERS)
            rows.append([name, *seconds, f'{ratio(times, "whole")["late"]:.2f}', *(differ(o, ours) for o in others)])
            print(rows[-1], flush=True)
    head = ['JPEG', 'whole', 'late', 'late / whole', 'late differs', 'bicubic differs', 'Lanczos differs']
    w, h = LARGE
    return table(head, rows) + (
        f'\nA photograph of {w:,}×{h:,} pixels, opened and resized to 224×224: processor time, medians of '
        f'{args.rounds} rounds. Differences from the whole one that was resized bilinearly: mean and largest, of 255.\n'
    )


# --- steps -----------------------------------------------------------------------------------------------------------


NETS = {
    'ResNet-18': lambda: timm.create_model('resnet18', num_classes=10),
    'WRN-28-2': wide_resnet,
    'ViT-Ti/4': lambda: timm.create_model('vit_tiny_patch16_224', num_classes=10, img_size=32, patch_size=4),
}


class Half(Policy):
    "Every second pseudo-label counts, so that what is timed does not depend on what is learned"

    def __init__(self, rate=0.5):
        super().__init__()
        self.rate = rate

    def forward(self, batch):
        n = len(batch.logits_weak)
        weights = torch.zeros(n, device=batch.logits_weak.device)
        weights[: round(self.rate * n)] = 1
        return PseudoLabels(batch.logits_weak.argmax(1), weights)


class Stamps(Callback):
    "When each batch ended"

    order, run_valid = 1000, False

    def __init__(self, device):
        self.device, self.stamps = device, []

    def after_batch(self):
        if self.device == 'cuda':
            torch.cuda.synchronize()
        self.stamps.append(time.perf_counter())


def batch(b, mu, device, size=32):
    g = torch.Generator().manual_seed(0)
    x, weak, strong = (torch.randn(n, 3, size, size, generator=g).to(device) for n in (b, b * mu, b * mu))
    return x, torch.randint(0, 10, (b,), generator=g).to(device), weak, strong


def bare(net, opt, data, amp):
    "A step written down: what there is to do and nothing else"
    x, y, weak, strong = data
    with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
        logits = net(torch.cat([x, weak, strong]))
    logits = logits.float()
    lx, (lw, ls) = logits[: len(x)], logits[len(x) :].chunk(2)
    targets = lw.detach().argmax(1)
    weights = torch.zeros(len(lw), device=x.device)
    weights[: len(lw) // 2] = 1
    loss = F.cross_entropy(lx, y) + (weights * F.cross_entropy(ls, targets, reduction='none')).mean()
    loss.backward()
    opt.step()
    opt.zero_grad()
    return loss.item()


class Bare:
    def __init__(self, net, data, device, amp):
        self.net, self.data, self.device, self.amp = net.to(device).train(), data, device, amp
        self.opt = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)

    def __call__(self, n=3):
        times = []
        for _ in range(n):
            start = time.perf_counter()
            bare(self.net, self.opt, self.data, self.amp)
            if self.device == 'cuda':
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times)


class Ours:
    def __init__(self, net, data, device, amp, forward, rate=0.5, teacher=None):
        x, y, weak, strong = data
        self.stamps = Stamps(device)
        self.learn = Learner(
            DataLoaders([(x, y)] * 4, [], device=device),
            net.to(device),
            CrossEntropyLossFlat(),
            opt_func=sgd,
            lr=0.01,
            wd=0.0,
            cbs=[FixMatch([(weak, strong)], policy=Half(rate), forward=forward, teacher=teacher), self.stamps],
        )
        if amp:
            self.learn.to_bf16()

    def __call__(self):
        self.stamps.stamps = []
        with self.learn.no_bar(), self.learn.no_logging():
            self.learn.fit(1)
        return statistics.median(b - a for a, b in zip(self.stamps.stamps, self.stamps.stamps[1:]))


def bench_steps(args):
    b, mu = (64, 7) if args.device == 'cuda' else (4, 7)
    text, modes = '', [False, True] if args.device == 'cuda' else [False]
    for amp in modes:
        rows = []
        for name in ['WRN-28-2'] if amp else NETS:
            data = batch(b, mu, args.device)
            methods = dict(bare=Bare(NETS[name](), data, args.device, amp))
            for forward in FORWARDS:
                methods[forward] = Ours(NETS[name](), data, args.device, amp, forward)
            methods['selective, 1 in 8'] = Ours(NETS[name](), data, args.device, amp, 'selective', 1 / 8)
            teacher = ModelEMA(half_life=2)
            methods['split, teacher'] = Ours(NETS[name](), data, args.device, amp, 'split', teacher=teacher)
            times = in_turn(methods, args.rounds)
            to_joint, to_bare, to_split = (ratio(times, o) for o in ('joint', 'bare', 'split'))
            ms = {k: f'{1e3 * statistics.median(v):.0f} ms' for k, v in times.items()}
            ratios = [to_bare['joint'], *(to_joint[k] for k in list(methods)[2:-1]), to_split['split, teacher']]
            rows.append([name, ms['bare'], ms['joint'], *(f'{o:.2f}' for o in ratios)])
            print(rows[-1], flush=True)
        head = ['', 'bare loop', 'joint', 'joint / bare', 'split / joint', 'selective / joint']
        head += ['selective, 1 in 8 / joint', 'teacher / split']
        text += f'{b} labelled images, mu {mu}, 32×32 pixels, {"bf16" if amp else "float32"}:\n\n'
        text += table(head, rows) + '\n'
    return text + (
        f'Medians of {args.rounds} rounds. A bare loop does the same forward and backward passes in plain PyTorch, '
        'on the same tensors. In *selective* half of the pseudo-labels count; in the next column one in eight. '
        'In the last one the pseudo-labels are those of an average, as in `fine_tune_fixmatch`.\n'
    )


# --- memory ----------------------------------------------------------------------------------------------------------


def memory(kind):
    "Bytes that this process holds (`VmRSS`) or has held at most (`VmHWM`)"
    status = Path('/proc/self/status')
    if status.exists():  # `ru_maxrss` would begin with what the parent process held
        return int(re.search(rf'{kind}:\s+(\d+)', status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def peak(forward, device):
    "Bytes that steps take beyond model, optimiser and data; in a process of its own"
    b, mu = (64, 7) if device == 'cuda' else (8, 7)
    ours = Ours(wide_resnet(), batch(b, mu, device), device, False, forward)
    if device == 'cuda':
        ours()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        ours()
        return torch.cuda.max_memory_allocated() - before
    tiny = Ours(wide_resnet(), batch(1, 1, device), device, False, forward)
    tiny()  # libraries, threads, workspaces
    gc.collect()
    before = memory('VmHWM')
    ours()
    return memory('VmHWM') - before


def alone(*argv):
    "What another process prints last"
    res = subprocess.run([sys.executable, __file__, *argv], capture_output=True, text=True, check=True)
    return json.loads(res.stdout.splitlines()[-1])


def bench_memory(args):
    found = {o: alone('--peak', o, '--device', args.device) for o in FORWARDS}
    print(found, flush=True)
    rows = [[o, f'{v / 1e6:,.0f} MB', f'{v / found["joint"]:.2f}'] for o, v in found.items()]
    b = 64 if args.device == 'cuda' else 8
    return table(['', 'peak memory of a step', 'to joint'], rows) + (
        f'\nWRN-28-2, {b} labelled images, mu 7, 32×32 pixels, float32, half of the pseudo-labels counting; '
        'model, optimiser and loaded images left out.\n'
    )


# --- growth ----------------------------------------------------------------------------------------------------------


def bench_mu(args):
    mus = (1, 3, 7)
    data = {mu: batch(4, mu, args.device) for mu in mus}
    methods = {(mu, f): Ours(NETS['ResNet-18'](), data[mu], args.device, False, f) for mu in mus for f in FORWARDS}
    to = ratio(in_turn(methods, args.rounds), (1, 'joint'))
    rows = [[f'mu {mu}', f'{4 + 8 * mu}', *(f'{to[mu, f]:.2f}' for f in FORWARDS)] for mu in mus]
    return table(['', 'images in the joint pass', *FORWARDS], rows) + (
        '\nStep time of a ResNet-18 with 4 labelled images, relative to the joint pass at mu 1; '
        f'medians of {args.rounds} rounds.\n'
    )


def start_up(n):
    "Seconds and bytes from a list of `n` paths to the first batch; in a process of its own"
    files = get_image_files(digits_path()).sorted()
    items = [files[i % len(files)] for i in range(n)]
    block = DataBlock(
        (ImageBlock, CategoryBlock),
        get_y=parent_label,
        splitter=IndexSplitter(range(40, 60)),
        batch_tfms=Normalize.from_stats(*imagenet_stats, cuda=False),
    )
    dls = block.dataloaders(files[:60], bs=4, num_workers=0)
    next(dls.unlabeled_dl(files[:100]).stream())
    before, start = memory('VmRSS'), time.perf_counter()
    stream = dls.unlabeled_dl(items).stream()
    next(stream)
    first = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(50):
        next(stream)
    return first, (time.perf_counter() - start) / 50, memory('VmRSS') - before


def bench_pool(args):
    rows = []
    for n in (1000, 100_000, 1_000_000):
        first, each, taken = alone('--pool', str(n))
        of_each = f'{taken / n:.0f}' if n > 1000 else ''
        rows.append([f'{n:,}', f'{first:.2f} s', f'{1e3 * each:.0f} ms', f'{taken / 1e6:.0f} MB', of_each])
        print(rows[-1], flush=True)
    head = ['images in the pool', 'to the first batch', 'each batch after', 'memory taken', 'bytes for each image']
    return table(head, rows) + (
        '\n28 images in a batch, no workers; the list of paths itself not counted. No image is held.\n'
    )


# --- accuracy --------------------------------------------------------------------------------------------------------


def bench_accuracy(args):
    files = get_image_files(digits_path()).sorted()
    accs, seconds = {o: [] for o in FORWARDS}, {o: [] for o in FORWARDS}
    for seed in range(args.seeds):
        for forward in FORWARDS:
            comparison = FewLabels(files, 40, steps=400, num_workers=1, flip=False)
            learn, start = comparison.learner(seed, True, forward=forward), time.process_time()
            with learn.no_bar(), learn.no_logging():
                learn.fit_one_cycle(1, comparison.lr)
            accs[forward].append(100 * learn.recorder.values[-1][2])
            seconds[forward].append(time.process_time() - start)
        print({k: v[-1] for k, v in accs.items()}, flush=True)
    mean, std = statistics.mean, statistics.stdev
    rows = [[o, f'{mean(accs[o]):.1f} ± {std(accs[o]):.1f}', f'{mean(seconds[o]):.0f} s'] for o in FORWARDS]
    return table(['', 'accuracy, %', 'processor time'], rows) + (
        '\nDigits, 40 labels, mu 7, 400 steps, the network of `make demo` (two convolutions with BatchNorm), '
        f'{args.seeds} seeds, {len(comparison.test)} test images; mean ± standard deviation. '
        'Processor time is that of the training process; views are made in another.\n'
    )


# --- waiting ---------------------------------------------------------------------------------------------------------


class Fresh:
    "Batches whose views are made as training goes on"

    def __init__(self, n, tfm, workers, device):
        files = get_image_files(digits_path()).sorted()
        block = DataBlock(
            (ImageBlock, CategoryBlock),
            get_y=parent_label,
            splitter=IndexSplitter(range(640, 700)),
            item_tfms=Resize(32),
            batch_tfms=Normalize.from_stats(*imagenet_stats, cuda=device == 'cuda'),
        )
        self.dls = block.dataloaders(files[:700], bs=n, num_workers=0, device=device)
        self.dl = self.dls.unlabeled_dl(files, tfm=tfm, num_workers=workers, cache=True)


def bench_waiting(args):
    "On a GPU only, where it matters"
    return waiting(args.device) if args.device == 'cuda' else ''


def waiting(device, b=64, steps=60):
    "Share of a WRN-28-2 step that goes to waiting for views"
    rows, cores, amp = [], len(os.sched_getaffinity(0)), device == 'cuda'
    data = batch(b, 7, device)
    for name, tfm, workers in (
        ('workers', FixMatchTransform(), 2),
        ('workers', FixMatchTransform(), min(cores, 8)),
        ('on the device', FixMatchBatchTransform(), 2),
    ):
        for forward in FORWARDS:
            ours = Ours(wide_resnet(), data, device, amp, forward)
            base = statistics.median(ours() for _ in range(3))
            fresh, stamps = Fresh(b, tfm, workers, device), Stamps(device)
            cbs = [FixMatch(fresh.dl, policy=Half(), forward=forward), stamps]
            learn = Learner(fresh.dls.repeat_train(steps), wide_resnet().to(device), opt_func=sgd, lr=0.01, cbs=cbs)
            if amp:
                learn.to_bf16()
            with learn.no_bar(), learn.no_logging():
                learn.fit(1)
            first, last = stamps.stamps[steps // 3], stamps.stamps[-1]  # workers have started by then
            step = (last - first) / (steps - 1 - steps // 3)
            waited = f'{max(0, 1 - base / step):.0%}'
            rows.append([name, workers, forward, f'{1e3 * base:.0f} ms', f'{1e3 * step:.0f} ms', waited])
            print(rows[-1], flush=True)
    return table(['views', 'workers', 'forward', 'step alone', 'step with views', 'waiting'], rows) + (
        f'\nWRN-28-2 in {"bf16" if amp else "float32"}, {b} labelled images, mu 7, cached digits at 32×32; '
        f'{cores} cores.\n'
    )


# --- the page --------------------------------------------------------------------------------------------------------

TABLES = {
    'views': ('Views', bench_views),
    'large': ('Large photos', bench_large),
    'steps': ('The step', bench_steps),
    'memory': ('Memory of a step', bench_memory),
    'accuracy': ('Accuracy', bench_accuracy),
    'mu': ('Growth with mu', bench_mu),
    'pool': ('Growth with the pool', bench_pool),
    'waiting': ('Waiting for views', bench_waiting),
}
ABOUT = (
    '# Speed, measured\n\n'
    '`make bench` measures and writes this page (`make bench ARGS="--only steps"` one table of it, '
    '`ARGS="--device cuda"` on a GPU). Compared are medians over rounds in which the methods take turns; '
    'a ratio is taken within each round. Times of a shared machine are noisy, ratios less so.\n'
)


def hardware(device):
    name = torch.cuda.get_device_name() if device == 'cuda' else ''
    if not name and (info := Path('/proc/cpuinfo')).exists():
        name = re.search(r'model name\s*:\s*(.*)', info.read_text())[1] + ', one thread'
    versions = f'Python {platform.python_version()}, torch {torch.__version__}, fastai {fastai.__version__}'
    return f'{name or platform.processor()}; {versions}, timm {timm.__version__}, Pillow {PIL.__version__}'


def page(results):
    "All tables, by device"
    text = ABOUT
    for device, name in (('cpu', 'On the CPU'), ('cuda', 'On a GPU')):
        text += f'\n## {name}\n'
        if device not in results:
            text += f'\nNot measured yet: `make bench ARGS="--device {device}"` does it.\n'
        for key, (title, _) in TABLES.items():
            if found := results.get(device, {}).get(key):
                text += f'\n### {title}\n\n{found["text"]}\n*{found["hardware"]}*\n'
    return text


def read_results(store):
    "What has been measured, by device"
    if not store.exists():
        return {}
    try:
        results = json.loads(store.read_text(encoding='utf-8'))
        page(results)
        return results
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise SystemExit(f'{store} is damaged: mend it, or give another --out.') from e


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
    parser.add_argument('--only', nargs='+', default=list(TABLES), choices=list(TABLES))
    parser.add_argument('--rounds', type=int, default=5, help='rounds in which methods take turns')
    parser.add_argument('--seeds', type=int, default=3, help='of the accuracies')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--out', type=Path, default=HERE, help='folder of results.json and results.md')
    parser.add_argument('--peak', help=argparse.SUPPRESS)
    parser.add_argument('--pool', type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('There is no CUDA device: leave out `--device cuda`.')
    torch.set_num_threads(args.threads)
    if args.peak or args.pool:
        print(json.dumps(peak(args.peak, args.device) if args.peak else start_up(args.pool)))
        return
    store = args.out / 'results.json'
    read_results(store)  # before anything is measured
    for key in args.only:
        print(f'--- {TABLES[key][0]}', flush=True)
        text = TABLES[key][1](args)
        results = read_results(store)
        results.setdefault(args.device, {})[key] = dict(text=text, hardware=hardware(args.device)) if text else None
        with replacing(store) as tmp:
            tmp.write_text(json.dumps(results, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
        (args.out / 'results.md').write_text(page(results), encoding='utf-8')


if __name__ == '__main__':
    main()
