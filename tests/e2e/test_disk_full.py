"""A disk that takes no more fails the job with the reason; the service lives and goes on.

The disk is made full by a limit on the size of files, which the worker's attempts inherit: the
kernel then refuses the write of the model as it does on a full disk, and no disk has to be filled.
"""

from __future__ import annotations

import resource

import pytest
from tests.e2e.service import JOB_SECONDS, Service, ask_base, new_bucket, wait_for

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not hasattr(resource, "prlimit"), reason="limits of other processes: Linux only"
    ),
]

LESS_THAN_A_MODEL = 4_000_000


def test_a_model_that_cannot_be_written_fails_the_job_with_the_reason(own_service: Service) -> None:
    bucket = new_bucket(own_service, "full")
    own_service.limit_file_size("outcrop worker", LESS_THAN_A_MODEL)
    arn = own_service.create_job(bucket, "full")
    job = own_service.wait_for_job(arn)
    assert job["status"] == "Failed"
    assert "The model could not be written" in job["failureMessage"]
    assert "nothing was published" in job["failureMessage"]
    assert own_service.progress(arn)["attempt"] == 1, "trying again cannot help"
    assert own_service.client("bedrock").list_custom_models()["modelSummaries"] == []
    work = own_service.data_dir / "work"
    wait_for(
        lambda: not [path for path in work.rglob("*") if path.is_file()],
        JOB_SECONDS,
        "the attempt's scratch files to go",
    )
    assert own_service.running
    assert ask_base(own_service)

    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    own_service.limit_file_size("outcrop worker", unlimited)
    again = own_service.wait_for_job(own_service.create_job(bucket, "again"))
    assert again["status"] == "Completed", again.get("failureMessage")
