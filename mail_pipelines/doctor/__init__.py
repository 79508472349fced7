"""What is wrong with an installation, and what to do about it. Every check only reads, and is a plain function that returns findings.

One module for each thing that is looked at, and `examination` for all of it at once. What does not belong here: looking up and judging what other packages
know (`domains.checking`, `provisioning`); here it is only said.
"""
