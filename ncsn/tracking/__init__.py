"""MLflow: the record of every run and the registry. The only package that imports mlflow.

MLflow reads these settings when it is imported: no report to its makers' servers (a run needs no network), no links
and progress lines printed between our own, beside a server of ours no eight processes for jobs of language models,
a server that is away is tried again for two minutes instead of sixteen, and files go through the server: the presigned
URLs that it would hand out name its S3 store as it knows it, which only its own network resolves.
A value that is already in the environment wins.
"""

import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "6")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
os.environ.setdefault("MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD", "false")
os.environ.setdefault("MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD", "false")
