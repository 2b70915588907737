"""MLflow: the record of every run, and the registry. The only package that imports mlflow.

MLflow reads these settings when it is imported; a value that is in the environment wins. No telemetry, because a run
needs no network. No links and progress lines between our own. No eight processes for jobs of language models next to
our server. Two minutes instead of sixteen for an unreachable server. Files go through the server, because its presigned
URLs have the address of S3 in the server's network.
"""

import logging
import os

logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # each attempt would be a warning
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "6")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
os.environ.setdefault("MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD", "false")
os.environ.setdefault("MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD", "false")
