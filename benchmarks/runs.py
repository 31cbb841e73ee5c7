"The runs of a benchmark: a line each of a CSV file, from which an interrupted benchmark goes on."

import csv
import io

import pandas as pd

from fixmatch_fastai.core import first_line, replacing


def read_runs(file, columns):
    "What has been measured; a line that an interrupt cut short is taken off, another damage is an error"
    if not file.exists():
        return pd.DataFrame(columns=columns)
    whole, newline, torn = file.read_bytes().rpartition(b'\n')
    if torn:
        print(f'{file}: the last line is cut short, so that run is made again', flush=True)
        with replacing(file) as tmp:
            tmp.write_bytes(whole + newline)
    try:
        rows = pd.read_csv(file, converters=dict(images=str)) if whole else pd.DataFrame(columns=columns)
    except ValueError as e:
        raise SystemExit(f'{file} is damaged ({first_line(e)}): mend it, or give another --out.') from e
    numbers = rows.reindex(columns=['labels', 'steps', 'seed', 'accuracy'])
    known = numbers.notna().all(axis=None) and all(map(pd.api.types.is_numeric_dtype, numbers.dtypes))
    if list(rows) != list(columns) or len(rows) and not known:
        raise SystemExit(f'{file} is damaged, or of another benchmark: mend it, or give another --out.')
    return rows


def add_run(file, columns, row):
    "Write a line, in one go"
    text = io.StringIO(newline='')
    writer = csv.DictWriter(text, columns)
    if not file.exists() or file.stat().st_size == 0:
        writer.writeheader()
    writer.writerow(row)
    with file.open('a', newline='', encoding='utf-8') as f:
        f.write(text.getvalue())
