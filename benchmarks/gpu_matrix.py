"""What works beside FixMatch on a GPU: the rows of tests/matrix.py in single, half and bfloat16 precision and channels-last.

    python benchmarks/gpu_matrix.py --device cuda                      all rows in all precisions, some minutes
    python benchmarks/gpu_matrix.py --device cuda --only MixUp fit     rows with these words in their names

It needs pytest beside the package, and writes gpu_matrix.md with hardware and versions. On the CPU, fastai's mixed precision does
nothing, and the networks return half-precision logits instead: that shows that the script runs, not that a GPU does.
"""

import argparse
import platform
import sys
import tempfile
import time
import warnings
from contextlib import redirect_stdout
from io import StringIO
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
    name = f'{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}' if torch.device(device).type == 'cuda' else platform.machine()
    return f'{name}, Python {platform.python_version()}, {versions}'


def outcome(row, bench):
    "`works`, `not run: why` or `fails: why`"
    try:
        with redirect_stdout(StringIO()):
            run(row, bench)
    except pytest.skip.Exception as e:
        return f'not run: {e.msg}'
    except Exception as e:
        return f'fails: {row.broken or type(e).__name__ + ": " + (str(e).strip().splitlines() or [""])[0][:200]}'
    return 'works'


def page(results, device):
    "Row -> precision -> outcome, as Markdown"
    columns = list(next(iter(results.values())))
    lines = [[matrix_page.shown(name), *(o.split(':')[0] for o in said.values())] for name, said in results.items()]
    kinds = [o.split(':')[0] for said in results.values() for o in said.values()]
    counts = ', '.join(f'{kinds.count(o)} {o}' for o in dict.fromkeys(kinds))
    title = '# What works beside FixMatch, on a GPU' if torch.device(device).type == 'cuda' else '# What works beside FixMatch, a trial on the CPU'
    parts = [title, f'{hardware(device)}. {len(results)} rows: {counts}.', matrix_page.table(lines, ['beside FixMatch', *(PRECISIONS[o] for o in columns)])]
    if why := matrix_page.notes(results, PRECISIONS):
        parts.append('\n'.join(why))
    return '\n\n'.join(parts) + '\n'


def main(argv=None):
    parser = argparse.ArgumentParser(description='Train the rows of the compatibility matrix on a GPU.')
    parser.add_argument('--device', default='cuda', help='cuda, cuda:1, or cpu for a trial')
    parser.add_argument('--precision', nargs='+', choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument('--only', nargs='+', metavar='WORDS', help='rows with any of these in their names')
    parser.add_argument('--out', default=HERE, type=Path, help='folder for gpu_matrix.md')
    args = parser.parse_args(argv)
    if torch.device(args.device).type == 'cuda' and not torch.cuda.is_available():
        sys.exit('There is no CUDA here: use a machine with a GPU, or --device cpu for a trial.')
    rows = [o for o in ROWS if not args.only or any(word in o.name for word in args.only)]
    if not rows:
        sys.exit(f'No row has {" or ".join(args.only)} in its name.')
    results = {o.name: {} for o in rows}
    for precision in args.precision:
        start = time.time()
        for row in rows:
            with tempfile.TemporaryDirectory() as tmp:
                results[row.name][precision] = said = outcome(row, Bench(Path(tmp), args.device, precision))
            if said != 'works':
                print(f'{precision}, {row.name}: {said}', flush=True)
        print(f'{precision}: {len(rows)} rows in {time.time() - start:.0f} s', flush=True)
    (args.out / 'gpu_matrix.md').write_text(page(results, args.device), encoding='utf-8')


if __name__ == '__main__':
    main()
