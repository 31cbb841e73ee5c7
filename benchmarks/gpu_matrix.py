"""What works beside FixMatch on a GPU: the rows of tests/journeys/matrix.py, also in half precision and channels-last.

    python benchmarks/gpu_matrix.py --device cuda                      all rows in all precisions, some minutes
    python benchmarks/gpu_matrix.py --device cuda --only MixUp fit     rows with these words in their names
    python benchmarks/gpu_matrix.py --device cuda --processes 14       the same in a minute, on as many cores

It needs pytest beside the package, and writes gpu_matrix.md with hardware and versions. On the CPU, fastai's mixed
precision does nothing, and the networks return half-precision logits instead: that shows that the script runs, not that
a GPU does.
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
sys.path += [str(HERE.parent / o) for o in ('tests/journeys', 'tests', 'tools', '')]
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
        first_line = (str(e).strip().splitlines() or [''])[0][:200]
        return f'fails: {type(e).__name__}: {first_line}'
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
        running = [pool.submit(trial, ROWS.index(row), device, precision) for row, precision in todo]
        for (row, precision), future in zip(todo, running):
            yield row, precision, future.result()


def page(results, device):
    "Row -> precision -> outcome, as Markdown"
    columns = ['beside FixMatch', *(PRECISIONS[o] for o in next(iter(results.values())))]
    rows = {name: [o.split(':')[0] for o in outcomes.values()] for name, outcomes in results.items()}
    kinds = [o for row in rows.values() for o in row]
    counts = ', '.join(f'{kinds.count(o)} {o}' for o in dict.fromkeys(kinds))
    where = 'on a GPU' if torch.device(device).type == 'cuda' else 'a trial on the CPU'
    table = matrix_page.table([[matrix_page.shown(name), *row] for name, row in rows.items()], columns)
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
    for row, precision, outcome in trials(rows, args.device, args.precision, args.processes):
        results[row.name][precision] = outcome
        if outcome != 'works':
            print(f'{precision}, {row.name}: {outcome}', flush=True)
    print(f'{len(rows) * len(args.precision)} trials in {time.time() - start:.0f} s', flush=True)
    (args.out / 'gpu_matrix.md').write_text(page(results, args.device), encoding='utf-8')


if __name__ == '__main__':
    main()
