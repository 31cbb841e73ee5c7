"Files from which a benchmark goes on: as written, cut short, damaged"

import pytest
import speed
from runs import add_run, read_runs

COLUMNS = ['images', 'labels', 'steps', 'seed', 'accuracy']


@pytest.fixture
def file(tmp_path):
    for seed in (0, 1):
        add_run(tmp_path / 'a.csv', COLUMNS, dict(zip(COLUMNS, ['007', 4, 10, seed, 0.5])))
    return tmp_path / 'a.csv'


def test_runs_come_back(file, tmp_path):
    rows = read_runs(file, COLUMNS)
    assert list(rows) == COLUMNS and [*map(tuple, rows.values)] == [('007', 4, 10, seed, 0.5) for seed in (0, 1)]
    (tmp_path / 'b.csv').touch()
    for name in ('b.csv', 'c.csv'):
        assert len(read_runs(tmp_path / name, COLUMNS)) == 0


@pytest.mark.parametrize('cut', [1, 2, 12])
def test_a_line_that_is_cut_short_is_made_again(file, capsys, cut):
    "What was written before stays byte by byte"
    whole = file.read_bytes()
    file.write_bytes(whole[:-cut])
    assert read_runs(file, COLUMNS).seed.tolist() == [0]
    assert 'a.csv: the last line is cut short' in capsys.readouterr().out
    add_run(file, COLUMNS, dict(zip(COLUMNS, ['007', 4, 10, 1, 0.5])))
    assert file.read_bytes() == whole


@pytest.mark.parametrize(
    'damage',
    [
        lambda o: o.replace(b'labels', b'label'),
        lambda o: o.replace(b'0.5', b'x', 1),
        lambda o: o.replace(b'0.5', b'', 1),
        lambda o: o + b'1,2,3,4,5,6\n',
        lambda o: b'{}\n',
        lambda o: b'\xff\xfe\n',
    ],
)
def test_a_damaged_file_of_a_benchmark_is_refused_and_kept(file, damage):
    text = damage(file.read_bytes())
    file.write_bytes(text)
    with pytest.raises(SystemExit, match=r'a\.csv is damaged.*: mend it, or give another --out\.'):
        read_runs(file, COLUMNS)
    assert file.read_bytes() == text


@pytest.mark.parametrize('text', ['', '[', '[]', '{"cpu": 3}', '{"cpu": {"steps": {"text": ""}}}'])
def test_damaged_results_of_speed_are_refused_before_measuring(tmp_path, monkeypatch, text):
    monkeypatch.setattr(speed, 'TABLES', {'steps': ('The step', pytest.fail)} | speed.TABLES)
    (tmp_path / 'results.json').write_text(text)
    with pytest.raises(SystemExit, match=r'results\.json is damaged: mend it, or give another --out\.'):
        speed.main(['--out', str(tmp_path), '--only', 'mu', '--rounds', '1'])
    assert (tmp_path / 'results.json').read_text() == text
