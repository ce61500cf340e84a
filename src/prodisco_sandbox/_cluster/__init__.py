"""Kubernetes: the only package that knows kubernetes_asyncio."""
