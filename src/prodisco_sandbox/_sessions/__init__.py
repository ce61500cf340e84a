"""Sessions: their table, their lives. Knows neither kubernetes_asyncio nor gRPC."""
