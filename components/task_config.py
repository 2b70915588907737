"""What is set on a task that computes elsewhere and is meant for the pods there.

A module of its own, read at compile time alone: inside a running task `kfp.dsl` has no names for this.
"""

from kfp import dsl

# kfp.local passes an empty TaskConfig, so one component serves both runners.
PASSED_ON = (
    *(
        dsl.TaskConfigPassthrough(field=field, apply_to_task=False)
        for field in (
            dsl.TaskConfigField.KUBERNETES_NODE_SELECTOR,
            dsl.TaskConfigField.KUBERNETES_TOLERATIONS,
            dsl.TaskConfigField.KUBERNETES_AFFINITY,
        )
    ),
    *(
        dsl.TaskConfigPassthrough(field=field, apply_to_task=True)
        for field in (
            dsl.TaskConfigField.RESOURCES,
            dsl.TaskConfigField.ENV,
            dsl.TaskConfigField.KUBERNETES_VOLUMES,
        )
    ),
)
"""Addresses and volumes are for the task's own pod as well, resources for it alone: the config sizes the others."""
