"""The RPCs that this server leaves out."""

# ruff: noqa: N802 (the protocol names its methods)

from __future__ import annotations

from typing import Any, NoReturn

import grpc

from prodisco_sandbox.proto import sandbox_pb2 as pb
from prodisco_sandbox.proto import sandbox_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class NoLanguageServer(sandbox_pb2_grpc.SandboxServiceServicer):
    """Answers UNIMPLEMENTED to every Lsp call, and says why."""

    async def LspWorkspaceSymbol(
        self, request: pb.LspWorkspaceSymbolRequest, context: Context
    ) -> pb.LspWorkspaceSymbolResponse:
        await _refuse(context)

    async def LspHover(self, request: pb.LspPositionRequest, context: Context) -> pb.LspHoverResponse:
        await _refuse(context)

    async def LspGoToDefinition(
        self, request: pb.LspPositionRequest, context: Context
    ) -> pb.LspLocationsResponse:
        await _refuse(context)

    async def LspFindReferences(
        self, request: pb.LspReferencesRequest, context: Context
    ) -> pb.LspLocationsResponse:
        await _refuse(context)

    async def LspDocumentSymbol(
        self, request: pb.LspDocumentRequest, context: Context
    ) -> pb.LspDocumentSymbolResponse:
        await _refuse(context)


async def _refuse(context: Context) -> NoReturn:
    await context.abort(
        grpc.StatusCode.UNIMPLEMENTED, "this server only runs code: it has no language server"
    )
    raise AssertionError("abort returned")
