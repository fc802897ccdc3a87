"""Where a customization job's outputs lie: objects in the owner's bucket, files in the data
directory.

The layout in the bucket is Bedrock's. Clients read the validation metrics at two places (with and
without the inner `validation/` folder, and Llama notebooks directly below
`validation_artifacts/`), so all of them are written.
Source: user guide, "Analyze the results of a model customization job", and those clients.
"""

from __future__ import annotations

from pathlib import Path

from outcrop.ids import S3Uri
from outcrop.settings import Settings

WRITE_CHECK = ".write_access_check_file.tmp"
STEP_METRICS = "training_artifacts/step_wise_training_metrics.csv"
STEP_DETAILS = "training_artifacts/step_metrics.jsonl"
DATA_REPORT_JSON = "data_report/report.json"
DATA_REPORT_PAGE = "data_report/report.html"
INPUT_STATUS = "input_status/manifest.report.csv"
VALIDATED_DATA = "validated_data/{role}/validated_prompts.jsonl"
CLEANED_DATA = "cleaned_data/{role}.jsonl"
CLEANING_LOG = "cleaned_data/{role}.changes.jsonl"
CLEANED_REPORT_JSON = "cleaned_data/report.json"
CLEANED_REPORT_PAGE = "cleaned_data/report.html"
EXPORT_MANIFEST = "manifest.json"
VALIDATION_METRICS = (
    "validation_artifacts/post_fine_tuning_validation/validation/validation_metrics.csv",
    "validation_artifacts/post_fine_tuning_validation/validation_metrics.csv",
    "validation_artifacts/validation_metrics.csv",
)


def output_folder(output: S3Uri, job_id: str) -> S3Uri:
    """Return the prefix below which a job writes."""
    return output.join(f"model-customization-job-{job_id}")


def task_folder(output: S3Uri, task_id: str) -> S3Uri:
    """Return the prefix below which a data task writes."""
    return output.join(f"data-task-{task_id}")


def export_folder(output: S3Uri, export_id: str) -> S3Uri:
    """Return the prefix below which an export writes."""
    return output.join(f"model-export-{export_id}")


def step_metrics_object(output: S3Uri, job_id: str) -> S3Uri:
    """Return where the loss of every step is written."""
    return output_folder(output, job_id).join(STEP_METRICS)


def step_details_object(output: S3Uri, job_id: str) -> S3Uri:
    """Return where what Bedrock's CSV has no column for is written: speed, memory, gradients."""
    return output_folder(output, job_id).join(STEP_DETAILS)


def validation_metrics_objects(output: S3Uri, job_id: str) -> list[S3Uri]:
    """Return where the validation losses are written: one file at each place that clients read."""
    folder = output_folder(output, job_id)
    return [folder.join(name) for name in VALIDATION_METRICS]


def job_folder(settings: Settings, job_id: str) -> Path:
    """Return the folder of a job's attempts; it is removed when the job ends."""
    return settings.data_dir / "work" / job_id


def input_folder(settings: Settings, job_id: str, fence: int) -> Path:
    """Return where an attempt keeps its copies of the data files."""
    return work_folder(settings, job_id, fence) / "input"


def work_folder(settings: Settings, job_id: str, fence: int) -> Path:
    """Return the scratch folder of one attempt."""
    return job_folder(settings, job_id) / str(fence)


def thread_plan_folder(settings: Settings) -> Path:
    """Return where it is kept how models use this machine's cores best; may be removed any time."""
    return settings.data_dir / "cache" / "threads"


def checkpoint_folder(settings: Settings, job_id: str, fence: int) -> Path:
    """Return where an attempt keeps its checkpoints: nobody else writes there."""
    return work_folder(settings, job_id, fence) / "checkpoints"


def earlier_checkpoint_folders(settings: Settings, job_id: str, fence: int) -> list[Path]:
    """Return where the attempts before this one kept theirs."""
    attempts = job_folder(settings, job_id).glob("*/checkpoints")
    mine = checkpoint_folder(settings, job_id, fence)
    return [folder for folder in attempts if folder != mine]


def model_folder(settings: Settings, model_id: str, fence: int) -> Path:
    """Return where an attempt publishes its model.

    The fence is part of the path: an attempt that lost its lease can write only where nobody looks.
    """
    return settings.data_dir / "models" / "custom" / model_id / str(fence)
