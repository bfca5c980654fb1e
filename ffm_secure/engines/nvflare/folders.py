"""What the engine reads in a participant's folder: the server's address, who may do what, which code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ffm_secure.engines.nvflare.certificates import CERTIFICATE, KEY, ROOT
from ffm_secure.storage.durable import create_folder, write_atomic

CONTROLLER: Final = "ffm_secure.engines.nvflare.server_side.RelayController"
EXECUTOR: Final = "ffm_secure.engines.nvflare.site_side.RelayExecutor"
LAUNCHER: Final = "ffm_secure.engines.nvflare.site_side.SiteLauncher"
APPROVAL: Final = "ffm_secure.engines.nvflare.site_side.RunApproval"
COURIER_SOCKET, SITE_SOCKET = "courier.sock", "site.sock"
HEARTBEAT_SECONDS: Final = 5.0
MOST_JOBS: Final = 8  # at a time, each a process of the coordinator
_LOG_BYTES, _LOGS_KEPT = 5_000_000, 5

Json = Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where the sites of a federation meet: its name, and the one port that is published."""

    federation: str
    host: str
    port: int

    @property
    def service(self) -> dict[str, str]:
        """Return the address in the engine's words."""
        return {"target": f"{self.host}:{self.port}", "scheme": "grpc"}


def write_server_folder(folder: Path, keys: Path, endpoint: Endpoint) -> None:
    """Write what the coordinator's server reads; `keys` holds its key and what the operator returned."""
    _write_keys(folder, keys, "server")
    server = {
        "name": endpoint.federation,
        "service": endpoint.service,
        "admin_server": endpoint.host,
        "admin_port": endpoint.port,
        "ssl_private_key": "server.key",
        "ssl_cert": "server.crt",
        "ssl_root_cert": "rootCA.pem",
        "connection_security": "mtls",
    }
    _write_json(folder / "startup" / "fed_server.json", {"format_version": 2, "servers": [server]})
    write_server_resources(folder)
    _write_policies(folder)


def write_server_resources(folder: Path) -> None:
    """Write what the server loads and where it keeps it; anew at every start, for a folder may be moved."""
    _write_json(folder / "local" / "resources.json", _server_resources(folder.resolve()))


def write_site_folder(folder: Path, keys: Path, endpoint: Endpoint, *, name: str) -> None:
    """Write what a site's relay reads; `keys` holds its key and what the operator returned."""
    _write_keys(folder, keys, "client")
    server = {"name": endpoint.federation, "service": endpoint.service, "identity": endpoint.host}
    client = {
        "ssl_private_key": "client.key",
        "ssl_cert": "client.crt",
        "ssl_root_cert": "rootCA.pem",
        "fqsn": name,
        "is_leaf": True,
        "connection_security": "mtls",
    }
    words = {"format_version": 2, "servers": [server], "client": client}
    _write_json(folder / "startup" / "fed_client.json", words)
    _write_json(folder / "local" / "resources.json", _site_resources())
    _write_policies(folder)


def write_submitter_folder(folder: Path, keys: Path, endpoint: Endpoint, *, name: str) -> None:
    """Write what the coordinator reads when it submits a job; `keys` as above."""
    _write_keys(folder, keys, "client")
    create_folder(folder / "transfer")
    admin = {
        "project_name": endpoint.federation,
        "username": name,
        "server_identity": endpoint.host,
        "scheme": "grpc",
        "host": endpoint.host,
        "port": endpoint.port,
        "connection_security": "mtls",
        "uid_source": "user_input",
        "with_file_transfer": True,
        "upload_dir": "transfer",
        "download_dir": "transfer",
        "client_key": "client.key",
        "client_cert": "client.crt",
        "ca_cert": "rootCA.pem",
    }
    _write_json(folder / "startup" / "fed_admin.json", {"format_version": 1, "admin": admin})
    limits = {"idle_timeout": 86_400.0, "login_timeout": 10.0, "with_debug": False, "prompt": "> "}
    _write_json(
        folder / "local" / "resources.json",
        {"format_version": 1, "admin": {**limits, "authenticate_msg_timeout": 5.0}},
    )


def write_job(folder: Path, *, sites: Sequence[str], run: str) -> Path:
    """Write a job that ships no code: two files that name installed classes, and the run it is for."""
    app = folder / "ffm-secure" / "app" / "config"
    shutil.rmtree(folder / "ffm-secure", ignore_errors=True)
    create_folder(app)
    server = {
        "format_version": 2,
        "workflows": [{"id": "relay", "path": CONTROLLER, "args": {}}],
        "components": [],
        "task_data_filters": [],
        "task_result_filters": [],
    }
    client = {
        "format_version": 2,
        "executors": [{"tasks": ["*"], "executor": {"path": EXECUTOR, "args": {}}}],
        "components": [],
        "task_data_filters": [],
        "task_result_filters": [],
    }
    meta = {
        "name": "ffm-secure",
        "resource_spec": {},
        "min_clients": 1,
        "deploy_map": {"app": ["server", *sites]},
        "custom_props": {"run": run},
    }
    _write_json(app / "config_fed_server.json", server)
    _write_json(app / "config_fed_client.json", client)
    _write_json(folder / "ffm-secure" / "meta.json", meta)
    return folder / "ffm-secure"


def _write_keys(folder: Path, keys: Path, name: str) -> None:
    create_folder(folder / "startup")
    create_folder(folder / "local")
    create_folder(folder / "transfer")
    for source, target in ((KEY, f"{name}.key"), (CERTIFICATE, f"{name}.crt"), (ROOT, "rootCA.pem")):
        write_atomic(folder / "startup" / target, (keys / source).read_bytes())


def _write_policies(folder: Path) -> None:
    _write_json(folder / "local" / "authorization.json", _authorization())
    _write_json(folder / "local" / "log_config.json", _log_settings())


def _authorization() -> Json:
    """Let everybody look at the state of jobs, and one kind of participant submit and end its own."""
    nothing = dict.fromkeys(
        ("submit_job", "clone_job", "manage_job", "download_job", "operate", "shell_commands", "byoc"), "none"
    )
    looking = {**nothing, "view": "any", "server-predeployed-flwr": "none"}
    submitter = {**looking, "submit_job": "any", "manage_job": "n:submitter"}
    permissions = {
        "project_admin": looking,
        "org_admin": looking,
        "member": looking,
        "lead": submitter,
    }
    return {"format_version": "1.0", "permissions": permissions}


def _server_resources(folder: Path) -> Json:
    storage = "nvflare.app_common.storages.filesystem_storage.FilesystemStorage"
    snapshots = {"root_dir": str(folder / "snapshots"), "uri_root": "/"}
    return {
        "format_version": 2,
        "class_list_enforcement_mode": "enforce",
        "class_allow_list": [CONTROLLER],
        "servers": [
            {
                "admin_storage": "transfer",
                "max_num_clients": 100,
                "heart_beat_timeout": 6 * HEARTBEAT_SECONDS,
                "download_job_url": "http://unused.invalid/",
                "admin_timeout": 10.0,
            }
        ],
        "snapshot_persistor": {
            "path": "nvflare.app_common.state_persistors.storage_state_persistor.StorageStatePersistor",
            "args": {"uri_root": "/", "storage": {"path": storage, "args": snapshots}},
        },
        "components": [
            _component(
                "job_scheduler",
                "nvflare.app_common.job_schedulers.job_scheduler.DefaultJobScheduler",
                max_jobs=MOST_JOBS,
                min_schedule_interval=1.0,
                max_schedule_interval=5.0,
            ),
            _component(
                "job_manager",
                "nvflare.apis.impl.job_def_manager.SimpleJobDefManager",
                uri_root=str(folder / "jobs"),
                job_store_id="job_store",
            ),
            _component("job_store", storage),
            _component(
                "process_launcher",
                "nvflare.app_common.job_launcher.server_process_launcher.ServerProcessJobLauncher",
            ),
        ],
    }


def _site_resources() -> Json:
    return {
        "format_version": 2,
        "class_list_enforcement_mode": "enforce",
        "class_allow_list": [EXECUTOR],
        "allow_log_streaming": False,
        "client": {"retry_timeout": 30, "compression": "Gzip"},
        "components": [
            _component(
                "resource_manager",
                "nvflare.app_common.resource_managers.gpu_resource_manager.GPUResourceManager",
                num_of_gpus=0,
                mem_per_gpu_in_GiB=0,
                expiration_period=300,
            ),
            _component(
                "resource_consumer",
                "nvflare.app_common.resource_consumers.gpu_resource_consumer.GPUResourceConsumer",
            ),
            _component("process_launcher", LAUNCHER),
            _component("run_approval", APPROVAL),
        ],
    }


def _component(name: str, path: str, **arguments: object) -> Json:
    return {"id": name, "path": path, "args": arguments}


def _log_settings() -> Json:
    """Write one log, kept short, in the participant's own folder; nothing goes to a terminal or a server."""
    form = {
        "()": "nvflare.fuel.utils.log_utils.BaseFormatter",
        "fmt": "%(asctime)s - %(name)s - %(levelname)s - %(fl_ctx)s - %(message)s",
    }
    file = {
        "class": "logging.handlers.RotatingFileHandler",
        "level": "DEBUG",
        "formatter": "baseFormatter",
        "filename": "log.txt",
        "mode": "a",
        "maxBytes": _LOG_BYTES,
        "backupCount": _LOGS_KEPT,
    }
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"baseFormatter": form},
        "handlers": {"logFileHandler": file},
        "loggers": {"root": {"level": "INFO", "handlers": ["logFileHandler"]}},
    }


def _write_json(path: Path, words: Json) -> None:
    write_atomic(path, json.dumps(words, indent=2).encode())
