"""What works beside FixMatch on a GPU: rows of tests/matrix.py in fp32, fp16, bfloat16 and channels-last.

    python benchmarks/gpu_matrix.py --device cuda                      all rows in all precisions, some minutes
    python benchmarks/gpu_matrix.py --device cuda --only MixUp fit     rows with these words in their names
    python benchmarks/gpu_matrix.py --device cuda --processes 14       the same in a minute, with as many cores

It needs pytest beside the package, and writes gpu_matrix.md with hardware and versions. On the CPU, fastai's mixed
precision does nothing, and the networks return half-precision logits instead: that shows that the script runs, not
that a GPU does.
"""

import argparse
import platform
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from io import StringIO
from multiprocessing import get_context
from pathlib import Path

HERE = Path(__file__).resolve().parent
for folder in ('tests', 'tools'):
    if str(HERE.parent / folder) not in sys.path:
        sys.path.append(str(HERE.parent / folder))
if str(HERE.parent) not in sys.path:
    sys.path.append(str(HERE.parent))
warnings.filterwarnings('ignore')  # before fastai is imported

import pytest  # noqa: E402
import torch  # noqa: E402
from matrix import ROWS, Bench, run  # noqa: E402

import matrix_page  # noqa: E402

PRECISIONS = {'fp32': 'single', 'fp16': '`to_fp16`', 'bf16': '`to_bf16`', 'channels_last': '`to_channelslast`'}
VERSIONS = ['fastai', 'torch', 'torchvision', 'timm']


def hardware(device):
    versions = ', '.join(f'{o} {__import__(o).__version__}' for o in VERSIONS)
    name = platform.machine()
    if torch.device(device).type == 'cuda':
        name = f'{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}'
    return f'{name}, Python {platform.python_version()}, {versions}'


def outcome(row, bench):
    "`works`, `not run: why` or `fails: why`"
    try:
        with redirect_stdout(StringIO()):
            run(row, bench)
    except pytest.skip.Exception as e:
        return f'not run: {e.msg}'
    except Exception as e:
        reason = next(iter(str(e).strip().splitlines()), '')[:200]
        return f'fails: {row.broken or f"{type(e).__name__}: {reason}"}'
    return 'works'


def trial(index, device, precision):
    "The outcome of one row, by its number: a process can't be sent the functions that a row holds"
    with tempfile.TemporaryDirectory() as tmp:
        return outcome(ROWS[index], Bench(Path(tmp), device, precision))


def trials(rows, device, precisions, processes):
    "`(row, precision, outcome)` of all, one after another or in several processes"
    todo = [(row, precision) for precision in precisions for row in rows]
    if processes == 1:
        for row, precision in todo:
            yield row, precision, trial(ROWS.index(row), device, precision)
        return
    with ProcessPoolExecutor(processes, get_context('spawn')) as pool:
        outcomes = [pool.submit(trial, ROWS.index(row), device, precision) for row, precision in todo]
        for (row, precision), found in zip(todo, outcomes):
            yield row, precision, found.result()


def page(results, device):
    "Row -> precision -> outcome, as Markdown"
    columns = list(next(iter(results.values())))
    kinds_of = {name: [o.split(':')[0] for o in found.values()] for name, found in results.items()}
    lines = [[matrix_page.shown(name), *kinds] for name, kinds in kinds_of.items()]
    kinds = [o for found in kinds_of.values() for o in found]
    counts = ', '.join(f'{kinds.count(o)} {o}' for o in dict.fromkeys(kinds))
    where = 'on a GPU' if torch.device(device).type == 'cuda' else 'a trial on the CPU'
    table = matrix_page.table(lines, ['beside FixMatch', *(PRECISIONS[o] for o in columns)])
    parts = [f'# What works beside FixMatch, {where}', f'{hardware(device)}. {len(results)} rows: {counts}.', table]
    if why := matrix_page.notes(results, PRECISIONS):
        parts.append('\n'.join(why))
    return '\n\n'.join(parts) + '\n'


def main(argv=None):
    parser = argparse.ArgumentParser(description='Train the rows of the compatibility matrix on a GPU.')
    parser.add_argument('--device', default='cuda', help='cuda, cuda:1, or cpu for a trial')
    parser.add_argument('--precision', nargs='+', choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument('--only', nargs='+', metavar='WORDS', help='rows with any of these in their names')
    parser.add_argument('--processes', type=int, default=1, help='how many train rows beside each other')
    parser.add_argument('--out', default=HERE, type=Path, help='folder for gpu_matrix.md')
    args = parser.parse_args(argv)
    if torch.device(args.device).type == 'cuda' and not torch.cuda.is_available():
        sys.exit('There is no CUDA here: use a machine with a GPU, or --device cpu for a trial.')
    rows = [o for o in ROWS if not args.only or any(word in o.name for word in args.only)]
    if not rows:
        sys.exit(f'No row has {" or ".join(args.only)} in its name.')
    results = {o.name: {} for o in rows}
    start = time.time()
    for row, precision, result in trials(rows, args.device, args.precision, args.processes):
        results[row.name][precision] = result
        if result != 'works':
            print(f'{precision}, {row.name}: {result}', flush=True)
    print(f'{len(rows) * len(args.precision)} trials in {time.time() - start:.0f} s', flush=True)
    (args.out / 'gpu_matrix.md').write_text(page(results, args.device), encoding='utf-8')


if __name__ == '__main__':
    main()
