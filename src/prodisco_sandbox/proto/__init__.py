"""The wire protocol: sandbox.proto and the stubs generated from it by `make proto`."""
