"Tables on the disk: any name of a file comes back, and what is written is whole text, or was not written"

import csv
import errno
import multiprocessing as mp
import os
import time
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixmatch_fastai.core import as_series, escape_name, only_writer, read_csv, replacing, save_csv, unescape_name

ODD = os.fsdecode(b'caf\xe9') if os.name != 'nt' else 'caf\udce9'
NAMES = [ODD, 'a\r', 'a\r\nb', r'\udce9', 'a,b', '"q"', "'", '<b>&amp;', '$x_1$', ' a ', '\U0001f600', 'y' * 300]


@given(st.text(st.sampled_from(list('\\u0dce589\r\n') + ['\udce9', '\ud800', 'é'])))
def test_any_name_is_found_again(name):
    text = escape_name(name)
    assert unescape_name(text) == name and '\r' not in text
    text.encode()


def test_names_that_are_text_stay_as_they_are():
    for o in ('café 猫.jpg', 'C:\\users\\1.jpg', 'a\nb', '\\ud', '\\u2024', ''):
        assert escape_name(o) == o


def test_a_table_comes_back_as_it_was(tmp_path):
    df = pd.DataFrame({'file': as_series(NAMES), 'confidence': 0.5, 'right': True})
    before = df.copy()
    save_csv(df, tmp_path / 'a.csv')
    pd.testing.assert_frame_equal(df, before)
    pd.testing.assert_frame_equal(read_csv(tmp_path / 'a.csv'), df)
    plain = pd.read_csv(tmp_path / 'a.csv')  # as anyone reads it
    assert plain.file.tolist() == [escape_name(o) for o in NAMES] and list(plain) == list(df)
    save_csv(df.assign(file=[Path(o) for o in NAMES]).iloc[::2], tmp_path / 'a.csv')
    assert read_csv(tmp_path / 'a.csv').file.tolist() == NAMES[::2]


@given(st.lists(st.text(st.sampled_from(list('=+-@\'\t\n\r \\u1a,"＝') + ['\udce9'])), min_size=1))
def test_a_spreadsheet_shows_names_as_text(tmp_path_factory, names):
    "No cell or header begins as a formula does, and each name comes back"
    file = tmp_path_factory.getbasetemp() / 'names.csv'
    save_csv(pd.DataFrame({'+name': as_series(names), 'loss': -0.5, 'n': -1}), file)
    with file.open(newline='', encoding='utf-8') as f:
        (name, *header), *rows = csv.reader(f)
    assert not [o for o, *_ in [[name], *rows] if o.lstrip(' ')[:1] in [*'=+-@\t\n\r＝']]
    assert header == ['loss', 'n'] and all(o == ['-0.5', '-1'] for _, *o in rows)
    back = read_csv(file, dtype={"'+name": str}, keep_default_na=False, skip_blank_lines=False)
    assert back['+name'].tolist() == names and back.loss.eq(-0.5).all() and back.n.eq(-1).all()


def test_names_with_an_apostrophe_alone_stay_as_they_are(tmp_path):
    "So do those of a table that an older version wrote"
    names = ["'", "'a'.png", 'a=b', '0=1', 'é-']
    save_csv(pd.DataFrame({'file': names}), tmp_path / 'a.csv')
    assert pd.read_csv(tmp_path / 'a.csv').file.tolist() == read_csv(tmp_path / 'a.csv').file.tolist() == names


def test_a_table_is_whole_or_as_it_was(tmp_path):
    class Stopped:
        def __str__(self):
            raise KeyboardInterrupt

    (tmp_path / 'a').write_text('old')
    with pytest.raises(KeyboardInterrupt):
        save_csv(pd.DataFrame({'a': ['half', Stopped()]}), tmp_path / 'a')
    assert (tmp_path / 'a').read_text() == 'old' and len(list(tmp_path.iterdir())) == 1


# --- one writer


def in_another_process(task, *args):
    "What `task` returns, or the error"
    fork = mp.get_context('fork')
    answers = fork.SimpleQueue()

    def run():
        try:
            answer = task(*args)
        except Exception as e:
            answer = e
        answers.put(answer)

    process = fork.Process(target=run)
    process.start()
    answer = answers.get()
    process.join()
    return answer


def write(folder, name=''):
    with only_writer(folder, ValueError('in use'), name):
        return 'written'


def test_a_folder_has_one_writer(tmp_path):
    folder = tmp_path / 'new' / 'run'
    with only_writer(folder, ValueError('in use')):
        assert str(in_another_process(write, folder)) == 'in use'
        assert in_another_process(write, folder, 'a.pth') == 'written', 'a file of its own'
        assert write(folder) == 'written', 'the same process is never refused'
    assert in_another_process(write, folder) == 'written' and not list(folder.iterdir())


def test_a_lock_goes_with_its_process(tmp_path):
    "Though it was killed, and workers of it live on, which have its open files"
    fork = mp.get_context('fork')
    begun = fork.SimpleQueue()

    def crash():
        with only_writer(tmp_path, ValueError('in use')):
            (tmp_path / 'a.csv.0123abcd.tmp').touch()
            if os.fork():
                begun.put(True)
            time.sleep(5)
            os._exit(0)

    process = fork.Process(target=crash)
    process.start()
    assert begun.get() and str(in_another_process(write, tmp_path)) == 'in use'
    process.kill()
    process.join()
    assert write(tmp_path) == 'written' and not list(tmp_path.iterdir()), 'nor a half-written file'


@pytest.mark.parametrize('code', [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_drive_without_locks_is_written_to(tmp_path, monkeypatch, code):
    def no_lock(*args):
        raise OSError(code, 'no locks')

    monkeypatch.setattr('fcntl.lockf', no_lock)
    with only_writer(tmp_path, ValueError('in use')):
        assert write(tmp_path) == 'written'
    monkeypatch.setattr(Path, 'open', no_lock)
    assert write(tmp_path) == 'written', 'nor one on which nothing can be written: whoever writes will say so'


def test_two_writers_of_a_file_do_not_meet(tmp_path):
    file = tmp_path / 'a.csv'
    with replacing(file) as first, replacing(file) as second:
        assert first != second
        first.write_text('first')
        second.write_text('second')
    assert file.read_text() == 'first' and list(tmp_path.iterdir()) == [file], 'the last to end'
