"""The version of this package: read when it is built, so it imports nothing."""

VERSION = "0.1.0"
