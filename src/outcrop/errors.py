"""Every exception of Outcrop, in one tree.

    OutcropError
    ├── ApiError(code, http_status, message)    goes to the client as AWS's typed error
    │   ├── ValidationException 400    ConflictException 400    ServiceQuotaExceededException 400
    │   ├── TooManyTagsException 400   AccessDeniedException 403   ResourceNotFoundException 404
    │   ├── ThrottlingException 429    InternalServerException 500 ServiceUnavailableException 503
    │   ├── ModelTimeoutException 408  ModelErrorException 424     ModelNotReadyException 429
    │   └── ModelStreamErrorException 424
    ├── SettingsError(ValueError)               at start; names the setting
    ├── StoreError                              the database refuses: too new, or locked by another
    ├── ObjectStoreError                        the object store answered with an error
    ├── DataError(ValueError)                   a record cannot be used: file, line, code, message
    ├── ModelError                              weights or a tokenizer cannot be read
    ├── TrainingError                           NonFiniteLoss, OutOfMemory, EmptyLoss
    └── ServingError                            the model server could not answer
    JobSignal(BaseException)                    StopRequested, LeaseLost: no `except Exception`
    eats them

Codes and statuses of ApiError are those of botocore's `bedrock` and `bedrock-runtime` models, and
a test compares them. A new error goes below the branch whose reader it is for. All of them
pickle: they cross processes.
"""

from __future__ import annotations


class OutcropError(Exception):
    """Anything that Outcrop itself raises on purpose."""


class ApiError(OutcropError):
    """An error a client receives in the protocol of the service it called.

    `members` holds the further members of the modelled error shape, such as `resourceName`.
    """

    code = "InternalServerException"
    http_status = 500

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        http_status: int | None = None,
        members: dict[str, object] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code
        if http_status is not None:
            self.http_status = http_status
        self.members = dict(members or {})

    def __reduce__(self) -> tuple[object, ...]:
        return (
            _rebuild_api_error,
            (type(self), self.message, self.code, self.http_status, self.members),
        )


def _rebuild_api_error(
    cls: type[ApiError], message: str, code: str, http_status: int, members: dict[str, object]
) -> ApiError:
    return cls(message, code=code, http_status=http_status, members=members)


class ValidationException(ApiError):
    """A parameter value, a state or a reference to data is wrong."""

    code = "ValidationException"
    http_status = 400


class ConflictException(ApiError):
    """A name is taken or a resource is in use. Bedrock answers 400 here, not 409."""

    code = "ConflictException"
    http_status = 400


class ServiceQuotaExceededException(ApiError):
    """A quota would be exceeded. Bedrock answers 400 here."""

    code = "ServiceQuotaExceededException"
    http_status = 400


class TooManyTagsException(ApiError):
    """More than 50 tags on one resource; `members` carries `resourceName`."""

    code = "TooManyTagsException"
    http_status = 400


class AccessDeniedException(ApiError):
    """The caller, or the role that was passed, may not do this."""

    code = "AccessDeniedException"
    http_status = 403


class ResourceNotFoundException(ApiError):
    """The named resource does not exist in this account and region."""

    code = "ResourceNotFoundException"
    http_status = 404


class ThrottlingException(ApiError):
    """Too many requests; the client may try again."""

    code = "ThrottlingException"
    http_status = 429


class InternalServerException(ApiError):
    """A fault of ours. The message names the request id, never the cause."""

    code = "InternalServerException"
    http_status = 500


class ServiceUnavailableException(ApiError):
    """The service cannot answer for now."""

    code = "ServiceUnavailableException"
    http_status = 503


class ModelTimeoutException(ApiError):
    """The model took longer than the limit."""

    code = "ModelTimeoutException"
    http_status = 408


class ModelErrorException(ApiError):
    """The model failed on this request."""

    code = "ModelErrorException"
    http_status = 424


class ModelNotReadyException(ApiError):
    """The model is not ready to serve; botocore retries this by itself."""

    code = "ModelNotReadyException"
    http_status = 429


class ModelStreamErrorException(ApiError):
    """The model failed in the middle of a stream."""

    code = "ModelStreamErrorException"
    http_status = 424


class SettingsError(OutcropError, ValueError):
    """A setting is unknown or has a value that cannot be used."""


class StoreError(OutcropError):
    """The database or the data directory cannot be used as it is."""


class ObjectStoreError(OutcropError):
    """The object store answered with an error.

    `code` is S3's error code ("NoSuchKey", "NoSuchBucket", "AccessDenied", ...).
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class DataError(OutcropError, ValueError):
    """A data file or one of its records cannot be used.

    `code` is the stable code of the defect, `line` counts from 1 and is None for the file as a
    whole.
    """

    def __init__(self, message: str, *, code: str, file: str, line: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.file = file
        self.line = line

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_data_error, (self.message, self.code, self.file, self.line))


def _rebuild_data_error(message: str, code: str, file: str, line: int | None) -> DataError:
    return DataError(message, code=code, file=file, line=line)


class ModelError(OutcropError):
    """Weights, a tokenizer or a model folder cannot be used."""


class TrainingError(OutcropError):
    """Training cannot go on; the message is written for the job's owner."""


class NonFiniteLossError(TrainingError):
    """The loss became NaN or infinite."""


class OutOfMemoryError(TrainingError):
    """The memory does not suffice, however small the parts that a step is cut into."""


class EmptyLossError(TrainingError):
    """No token of the data carries loss."""


class ServingError(OutcropError):
    """The model server could not answer."""


class JobSignal(BaseException):
    """Control flow of a job's attempt that no `except Exception` may swallow."""


class StopRequested(JobSignal):
    """The job's owner asked it to stop."""


class LeaseLost(JobSignal):
    """Another worker holds the job now: this attempt may write nothing more."""
