"""The outputs of a batch job: a file for each of the input, in its order, and the manifest.

`<output>/<job id>/<input file>.out` has a line for each record: what was asked and what was
answered, or why not. `manifest.json.out` beside them has the counts.

Source: user guide, "View the results of a batch inference job".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from outcrop.ids import S3Uri
from outcrop.jobs import places
from outcrop.jobs.batch.inputs import BatchFile, record_id, record_of
from outcrop.jobs.batch.journal import Journal
from outcrop.objects.client import ObjectStore
from outcrop.store.rows import Job

MANIFEST = "manifest.json.out"


def output_folder(output: S3Uri, job_id: str) -> S3Uri:
    """Return the prefix below which a job writes."""
    return output.join(job_id)


def output_place(job: Job) -> S3Uri:
    """Return the place that a job's owner named for its outputs."""
    named = job.spec["outputDataConfig"]["s3OutputDataConfig"]["s3Uri"]
    return places.place(places.BATCH_OUTPUT, named)


def write_file(
    objects: ObjectStore, folder: S3Uri, file: BatchFile, journal: Journal, scratch: Path
) -> None:
    """Write the output of one file; records that have no answer are left out.

    Args:
        folder: where the job writes.
        scratch: a path for the file before it is sent; is removed again.
    """
    with scratch.open("wb") as stream:
        for number, line in file.records():
            answer = journal.get(number)
            if answer is None:
                continue
            record = record_of(line)
            head = {"recordId": record_id(record, number), "modelInput": record["modelInput"]}
            name = b"error" if answer.is_error else b"modelOutput"
            stream.write(dump(head)[:-1] + b',"' + name + b'":' + answer.content + b"}\n")
    objects.write(folder.join(f"{file.name}.out"), scratch)
    scratch.unlink()


def manifest(num_records: int, journal: Journal) -> dict[str, int]:
    """Return the counts of a job."""
    return {
        "totalRecordCount": num_records,
        "processedRecordCount": journal.num_answers,
        "successRecordCount": journal.num_answers - journal.num_errors,
        "errorRecordCount": journal.num_errors,
        "inputTokenCount": journal.input_tokens,
        "outputTokenCount": journal.output_tokens,
    }


def dump(value: Any) -> bytes:
    """Return JSON on one line."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
