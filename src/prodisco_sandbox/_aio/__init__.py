"""asyncio: owned tasks, single flight, pacing."""
