"""The Hub of Hugging Face: releases pushed so that plain PEFT loads them too, and installed with every byte hashed by us.

A repo holds one adapter; version 1.2.0 is the tag v1.2.0, which is made last. Beside PEFT's files lies `adapterhub/`:

manifest.json             the release's manifest
manifests/<digest>.json   those of the parents that it needs
signatures/<digest>.json  the envelopes of a signed release
layout.json               digest of a blob -> [[file of the repo, offset, bytes], ...], where its bytes are, in order
rest                      the bytes that stand in no other file
"""
