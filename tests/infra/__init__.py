"""Hosts as the playbooks of `infra/ansible` make them."""
