"What must keep working beside FixMatch, row by row: see matrix.py"

import json
import os
import sys
from pathlib import Path

import pytest
from fastai.vision.all import noop
from matrix import ELSEWHERE, NOT_TAUGHT, ROWS, TAUGHT, Bench, Row, run

from fixmatch_fastai.all import FixMatch, ModelEMA
from fixmatch_fastai.record import SemiRecorder

ROOT = Path(__file__).parent.parent
sys.path += [str(ROOT / 'tools'), str(ROOT / 'benchmarks')]
import gpu_matrix  # noqa: E402

import matrix_page  # noqa: E402

pytestmark = [pytest.mark.filterwarnings(f'ignore:{o}') for o in ('CUDA is not available', 'torch.cuda.amp.GradScaler is enabled', 'load_learner')]
DEVICE, PRECISION = os.environ.get('MATRIX_DEVICE', 'cpu'), os.environ.get('MATRIX_PRECISION', 'fp32')


@pytest.mark.parametrize('row', [pytest.param(o, id=o.name, marks=[pytest.mark.xfail(strict=True, reason=o.broken)] * bool(o.broken)) for o in ROWS])
def test_row(row, tmp_path):
    run(row, Bench(tmp_path, DEVICE, PRECISION))


@pytest.mark.parametrize('row', [pytest.param(o, id=o.name) for o in TAUGHT])
def test_with_a_teacher(row, tmp_path):
    run(row, Bench(tmp_path, DEVICE, PRECISION, teacher=lambda: ModelEMA(half_life=2)))


def test_rows_without_a_teacher_are_rows():
    assert set(NOT_TAUGHT) <= {o.name for o in ROWS} and len(TAUGHT) > 60


def leave_columns_out(monkeypatch):
    start = SemiRecorder.start
    monkeypatch.setattr(SemiRecorder, 'start', lambda self, columns: start(self, columns[:2]))


def leave_stream_open(monkeypatch):
    monkeypatch.setattr(FixMatch, 'after_fit', noop)


@pytest.mark.parametrize(
    'harm,says,how',
    [
        (noop, 'FixMatch changed nothing', dict(lambda_u=0.0)),
        (noop, '6 steps, not 7', dict(steps=7)),
        (leave_columns_out, 'loss_u', {}),
        (leave_stream_open, 'a loader still runs', {}),
    ],
    ids=['no effect', 'steps', 'columns', 'stream'],
)
def test_the_bench_notices(tmp_path, monkeypatch, harm, says, how):
    harm(monkeypatch)
    with pytest.raises(AssertionError, match=says):
        Bench(tmp_path).trains(**how)


def test_the_page_lists_these_rows():
    results = json.loads((ROOT / 'benchmarks/matrix.json').read_text())
    names = [o.name for o in ROWS]
    assert len(names) == len(set(names)), 'two rows have one name'
    assert list(results['rows']) == names + list(ELSEWHERE), 'run `make matrix`'
    assert (ROOT / 'benchmarks/matrix.md').read_text() == matrix_page.page(results)
    broken = {o.name for o in ROWS if o.broken}
    failed = {name for name, said in results['rows'].items() if any(v.startswith('fails') for v in said.values())}
    assert failed == broken, 'a row that fails says why, in `broken`'


def fail(bench):
    raise ValueError('no\nway')


def skip(bench):
    pytest.skip('no such package')


def test_gpu_matrix(tmp_path, monkeypatch, capsys):
    rows = [o for o in ROWS if o.name in ('fit_one_cycle', 'to_fp32')] + [Row('', 'a failure', '', fail), Row('', 'a package', '', skip)]
    monkeypatch.setattr(gpu_matrix, 'ROWS', rows)
    gpu_matrix.main(['--device', 'cpu', '--precision', 'fp16', 'channels_last', '--out', str(tmp_path)])
    text = (tmp_path / 'gpu_matrix.md').read_text()
    assert '| `fit_one_cycle` | works | works |\n| `to_fp32` | works | works |\n| a failure | fails | fails |\n| a package | not run | not run |' in text
    assert '- a failure, `to_fp16`, `to_channelslast`: fails, as ValueError: no\n- a package' in text and '4 rows: 4 works, 2 fails, 2 not run' in text
    with pytest.raises(SystemExit, match='No row has MixMatch'):
        gpu_matrix.main(['--device', 'cpu', '--only', 'MixMatch'])
