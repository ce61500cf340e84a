"""The protocol: every name, number and type, and stubs that fit the .proto files."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto

from prodisco_sandbox.proto import files_pb2, sandbox_pb2
from tests.support import ROOT
from tests.support.patience import PATIENCE

# Request, response; "stream" where the responses are many.
METHODS = {
    "Execute": "ExecuteRequest ExecuteResponse",
    "ExecuteStream": "ExecuteRequest stream ExecuteChunk",
    "ExecuteAsync": "ExecuteRequest ExecuteAsyncResponse",
    "GetExecution": "GetExecutionRequest GetExecutionResponse",
    "CancelExecution": "CancelExecutionRequest CancelExecutionResponse",
    "ListExecutions": "ListExecutionsRequest ListExecutionsResponse",
    "HealthCheck": "HealthCheckRequest HealthCheckResponse",
    "ListCache": "ListCacheRequest ListCacheResponse",
    "ClearCache": "ClearCacheRequest ClearCacheResponse",
    "ExecuteTest": "ExecuteTestRequest ExecuteTestResponse",
    "LspWorkspaceSymbol": "LspWorkspaceSymbolRequest LspWorkspaceSymbolResponse",
    "LspHover": "LspPositionRequest LspHoverResponse",
    "LspGoToDefinition": "LspPositionRequest LspLocationsResponse",
    "LspFindReferences": "LspReferencesRequest LspLocationsResponse",
    "LspDocumentSymbol": "LspDocumentRequest LspDocumentSymbolResponse",
}

# Number, name, label (opt: explicit presence, rep: repeated), type, oneof.
MESSAGES = {
    "ExecuteRequest": "1 code string in source, 2 cached string in source, 3 timeout_ms opt int32",
    "CacheEntry": "1 name string, 2 description string, 3 created_at_ms int64, 4 content_hash string",
    "ExecuteResponse": (
        "1 success bool, 2 output string, 3 error opt string, 4 execution_time_ms int64,"
        " 5 cached opt CacheEntry"
    ),
    "HealthCheckRequest": "",
    "HealthCheckResponse": "1 healthy bool, 2 kubernetes_context string",
    "ListCacheRequest": "1 filter opt string",
    "ListCacheResponse": "1 entries rep CacheEntry",
    "ClearCacheRequest": "",
    "ClearCacheResponse": "1 deleted_count int64",
    "ExecuteChunk": (
        "1 execution_id string, 2 output string in chunk, 3 error_output string in chunk,"
        " 4 result ExecuteResult in chunk, 5 timestamp_ms int64"
    ),
    "ExecuteResult": (
        "1 success bool, 2 error opt string, 3 execution_time_ms int64, 4 state ExecutionState,"
        " 5 cached opt CacheEntry"
    ),
    "ExecuteAsyncResponse": "1 execution_id string, 2 state ExecutionState",
    "GetExecutionRequest": "1 execution_id string, 2 wait bool, 3 output_offset int64",
    "GetExecutionResponse": (
        "1 execution_id string, 2 state ExecutionState, 3 output string, 4 error_output string,"
        " 5 output_length int64, 6 error_output_length int64, 7 result opt ExecuteResult"
    ),
    "CancelExecutionRequest": "1 execution_id string",
    "CancelExecutionResponse": "1 success bool, 2 state ExecutionState, 3 message opt string",
    "ListExecutionsRequest": (
        "1 states rep ExecutionState, 2 limit int32, 3 include_completed_within_ms int64"
    ),
    "ExecutionInfo": (
        "1 execution_id string, 2 state ExecutionState, 3 started_at_ms int64, 4 finished_at_ms opt int64,"
        " 5 code_preview string, 6 is_cached bool, 7 cached_name opt string"
    ),
    "ListExecutionsResponse": "1 executions rep ExecutionInfo",
    "ExecuteTestRequest": "1 code opt string, 2 tests string, 3 timeout_ms opt int32",
    "TestResult": "1 name string, 2 passed bool, 3 error opt string, 4 duration_ms int64",
    "TestSummary": "1 total int32, 2 passed int32, 3 failed int32, 4 skipped int32",
    "ExecuteTestResponse": (
        "1 success bool, 2 summary TestSummary, 3 tests rep TestResult, 4 output string,"
        " 5 execution_time_ms int64, 6 error opt string"
    ),
    "LspWorkspaceSymbolRequest": "1 query string, 2 limit opt int32",
    "LspPositionRequest": "1 file_path string, 2 line int32, 3 character int32",
    "LspReferencesRequest": (
        "1 file_path string, 2 line int32, 3 character int32, 4 include_declaration bool"
    ),
    "LspDocumentRequest": "1 file_path string",
    "LspRange": "1 start_line int32, 2 start_character int32, 3 end_line int32, 4 end_character int32",
    "LspLocation": "1 uri string, 2 range LspRange",
    "LspSymbolInfo": (
        "1 name string, 2 kind LspSymbolKind, 3 library string, 4 container_name string,"
        " 5 location LspLocation"
    ),
    "LspWorkspaceSymbolResponse": "1 symbols rep LspSymbolInfo, 2 total_matches int32",
    "LspHoverResponse": "1 contents string, 2 range opt LspRange",
    "LspLocationsResponse": "1 locations rep LspLocation",
    "LspDocumentSymbol": (
        "1 name string, 2 kind LspSymbolKind, 3 detail string, 4 range LspRange,"
        " 5 selection_range LspRange, 6 children rep LspDocumentSymbol"
    ),
    "LspDocumentSymbolResponse": "1 symbols rep LspDocumentSymbol",
}

# The project's own addition.
FILE_METHODS = {
    "Read": "ReadRequest stream ReadResponse",
    "Write": "stream WriteRequest FileInfo",
    "List": "ListRequest ListResponse",
    "Stat": "StatRequest FileInfo",
    "Remove": "RemoveRequest RemoveResponse",
    "MakeDirectory": "MakeDirectoryRequest FileInfo",
}
FILE_MESSAGES = {
    "FileInfo": "1 path string, 2 size int64, 3 kind FileKind, 4 modified_at_ms int64",
    "ReadRequest": "1 path string, 2 offset int64, 3 length opt int64",
    "ReadResponse": "1 info FileInfo in part, 2 data bytes in part",
    "WriteRequest": "1 path string in part, 2 data bytes in part, 3 size int64 in part",
    "ListRequest": "1 path string, 2 recursive bool, 3 limit int32, 4 since_execution string",
    "ListResponse": "1 files rep FileInfo, 2 truncated bool",
    "StatRequest": "1 path string",
    "RemoveRequest": "1 path string, 2 recursive bool",
    "RemoveResponse": "",
    "MakeDirectoryRequest": "1 path string",
}

# The values from 0 on, without their prefix.
FILE_ENUMS = {"FileKind": ("FILE_KIND_", "UNSPECIFIED FILE DIRECTORY OTHER")}
ENUMS = {
    "ExecutionState": (
        "EXECUTION_STATE_",
        "UNSPECIFIED PENDING RUNNING COMPLETED FAILED CANCELLED TIMEOUT",
    ),
    "LspSymbolKind": (
        "LSP_SYMBOL_KIND_",
        "UNSPECIFIED FILE MODULE NAMESPACE PACKAGE CLASS METHOD PROPERTY FIELD CONSTRUCTOR ENUM INTERFACE"
        " FUNCTION VARIABLE CONSTANT STRING NUMBER BOOLEAN ARRAY OBJECT KEY NULL ENUM_MEMBER STRUCT EVENT"
        " OPERATOR TYPE_PARAMETER",
    ),
}


@dataclass
class Contract:
    """A proto file, and what it has to hold."""

    file: FileDescriptorProto
    service: str
    methods: dict[str, str]
    messages: dict[str, str]
    enums: dict[str, tuple[str, str]]


@pytest.fixture(params=["SandboxService", "FileService"])
def contract(request: pytest.FixtureRequest) -> Contract:
    proto = FileDescriptorProto()
    if request.param == "SandboxService":
        sandbox_pb2.DESCRIPTOR.CopyToProto(proto)
        return Contract(proto, request.param, METHODS, MESSAGES, ENUMS)
    files_pb2.DESCRIPTOR.CopyToProto(proto)
    return Contract(proto, request.param, FILE_METHODS, FILE_MESSAGES, FILE_ENUMS)


def described(message: DescriptorProto, field: FieldDescriptorProto) -> str:
    words = [str(field.number), field.name]
    if field.proto3_optional:
        words.append("opt")
    elif field.label == FieldDescriptorProto.LABEL_REPEATED:
        words.append("rep")
    if field.type_name:
        words.append(field.type_name.rpartition(".")[2])
    else:
        words.append(FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower())
    if field.HasField("oneof_index") and not field.proto3_optional:
        words += ["in", message.oneof_decl[field.oneof_index].name]
    return " ".join(words)


def test_every_message_is_as_the_contract_says(contract: Contract) -> None:
    found = {
        message.name: ", ".join(described(message, field) for field in message.field)
        for message in contract.file.message_type
    }
    assert found == contract.messages


def test_every_method_is_as_the_contract_says(contract: Contract) -> None:
    file = contract.file
    (service,) = file.service
    assert (file.syntax, file.package, service.name) == ("proto3", "prodisco.sandbox.v1", contract.service)
    found = {}
    for method in service.method:
        words = ["stream"] * method.client_streaming + [method.input_type]
        words += ["stream"] * method.server_streaming + [method.output_type]
        found[method.name] = " ".join(word.removeprefix(".prodisco.sandbox.v1.") for word in words)
    assert found == contract.methods


def test_every_enum_is_as_the_contract_says(contract: Contract) -> None:
    enums = contract.file.enum_type
    found = {enum.name: [(value.name, value.number) for value in enum.value] for enum in enums}
    assert found == {
        name: [(prefix + value, number) for number, value in enumerate(values.split())]
        for name, (prefix, values) in contract.enums.items()
    }


def test_the_committed_stubs_are_what_the_proto_files_generate(tmp_path: Path) -> None:
    python = Path(os.environ.get("PRODISCO_PROTO_PYTHON") or ROOT / ".venv-proto" / "bin" / "python")
    if not python.exists():
        pytest.skip(f"{python} is missing: `make proto` sets up what generates the stubs")
    out = [f"--{kind}_out={tmp_path}" for kind in ("python", "grpc_python")]
    out += [f"--{kind}_out=quiet:{tmp_path}" for kind in ("mypy", "mypy_grpc")]
    protos = [
        path.relative_to(ROOT) for path in (ROOT / "src" / "prodisco_sandbox" / "proto").glob("*.proto")
    ]
    subprocess.run(
        [python, "-m", "grpc_tools.protoc", "-Isrc", *out, *protos],
        cwd=ROOT,
        env=os.environ | {"PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}"},
        check=True,
        timeout=PATIENCE,
    )
    committed = ROOT / "src" / "prodisco_sandbox" / "proto"
    generated = tmp_path / "prodisco_sandbox" / "proto"
    names = {path.name for path in generated.iterdir()}
    assert names == {path.name for path in committed.glob("*_pb2*")}
    for name in sorted(names):
        assert (generated / name).read_bytes() == (committed / name).read_bytes(), f"{name}: run `make proto`"
