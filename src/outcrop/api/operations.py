"""Which function answers which operation. What is not in this table answers 501 with its name."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from outcrop.api import (
    base_models,
    batch_jobs,
    converse,
    custom_models,
    customization_jobs,
    data_tasks,
    deliveries,
    deployments,
    identity,
    inference_profiles,
    logging_config,
    progress,
    resource_policies,
    runtime,
    streaming,
    tags,
    throughputs,
)
from outcrop.api.context import Output, RequestContext

SyncOperation = Callable[[RequestContext, dict[str, Any]], dict[str, Any]]
"""Takes the request's context and its validated members, returns the answer's members."""
AsyncOperation = Callable[[RequestContext, dict[str, Any]], Awaitable[Output]]
"""One that waits for a model."""
Operation = SyncOperation | AsyncOperation

OPERATIONS: dict[tuple[str, str], Operation] = {
    ("bedrock", "ListFoundationModels"): base_models.list_foundation_models,
    ("bedrock", "GetFoundationModel"): base_models.get_foundation_model,
    ("bedrock", "GetFoundationModelAvailability"): base_models.get_foundation_model_availability,
    ("bedrock", "CreateModelCustomizationJob"): customization_jobs.create,
    ("bedrock", "GetModelCustomizationJob"): customization_jobs.get,
    ("bedrock", "ListModelCustomizationJobs"): customization_jobs.list_,
    ("bedrock", "StopModelCustomizationJob"): customization_jobs.stop,
    ("bedrock", "GetCustomModel"): custom_models.get,
    ("bedrock", "ListCustomModels"): custom_models.list_,
    ("bedrock", "DeleteCustomModel"): custom_models.delete,
    ("bedrock", "CreateProvisionedModelThroughput"): throughputs.create,
    ("bedrock", "GetProvisionedModelThroughput"): throughputs.get,
    ("bedrock", "ListProvisionedModelThroughputs"): throughputs.list_,
    ("bedrock", "UpdateProvisionedModelThroughput"): throughputs.update,
    ("bedrock", "DeleteProvisionedModelThroughput"): throughputs.delete,
    ("bedrock", "CreateCustomModelDeployment"): deployments.create,
    ("bedrock", "GetCustomModelDeployment"): deployments.get,
    ("bedrock", "ListCustomModelDeployments"): deployments.list_,
    ("bedrock", "UpdateCustomModelDeployment"): deployments.update,
    ("bedrock", "DeleteCustomModelDeployment"): deployments.delete,
    ("bedrock", "CreateInferenceProfile"): inference_profiles.create,
    ("bedrock", "GetInferenceProfile"): inference_profiles.get,
    ("bedrock", "ListInferenceProfiles"): inference_profiles.list_,
    ("bedrock", "DeleteInferenceProfile"): inference_profiles.delete,
    ("bedrock", "PutResourcePolicy"): resource_policies.put,
    ("bedrock", "GetResourcePolicy"): resource_policies.get,
    ("bedrock", "DeleteResourcePolicy"): resource_policies.delete,
    ("bedrock", "CreateModelInvocationJob"): batch_jobs.create,
    ("bedrock", "GetModelInvocationJob"): batch_jobs.get,
    ("bedrock", "ListModelInvocationJobs"): batch_jobs.list_,
    ("bedrock", "StopModelInvocationJob"): batch_jobs.stop,
    ("bedrock", "PutModelInvocationLoggingConfiguration"): logging_config.put,
    ("bedrock", "GetModelInvocationLoggingConfiguration"): logging_config.get,
    ("bedrock", "DeleteModelInvocationLoggingConfiguration"): logging_config.delete,
    ("bedrock", "TagResource"): tags.tag_resource,
    ("bedrock", "UntagResource"): tags.untag_resource,
    ("bedrock", "ListTagsForResource"): tags.list_tags_for_resource,
    ("bedrock-runtime", "InvokeModel"): runtime.invoke_model,
    ("bedrock-runtime", "InvokeModelWithResponseStream"): streaming.invoke_model,
    ("bedrock-runtime", "Converse"): converse.converse,
    ("bedrock-runtime", "ConverseStream"): converse.converse_stream,
    ("bedrock-runtime", "CountTokens"): converse.count_tokens,
    ("sts", "GetCallerIdentity"): identity.get_caller_identity,
    ("outcrop", "GetJobProgress"): progress.get_job_progress,
    ("outcrop", "GetJobMetrics"): progress.get_job_metrics,
    ("outcrop", "ListJobEvents"): progress.list_job_events,
    ("outcrop", "GetDeliveryStatus"): deliveries.get_delivery_status,
    ("outcrop", "StartDataTask"): data_tasks.start,
    ("outcrop", "GetDataTask"): data_tasks.get,
    ("outcrop", "ListDataTasks"): data_tasks.list_,
    ("outcrop", "StopDataTask"): data_tasks.stop,
}
