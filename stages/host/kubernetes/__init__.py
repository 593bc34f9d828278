"""Starts and watches the stages of a run as Jobs of a Kubernetes cluster, for `lorry launch --on kubernetes`."""
