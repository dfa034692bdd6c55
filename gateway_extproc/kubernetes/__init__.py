"""The controller: what Envoy Gateway needs to know of each model, written to Kubernetes and kept that way.

``plan.py`` decides, without I/O: from the objects that there are to those that there should be, and what to tell whom.
``controller.py`` looks, applies and tells. ``lease.py`` sees to it that one of several does so.
"""
