"""The wire protocol: the .proto files, and the stubs generated from them by `make proto`."""
