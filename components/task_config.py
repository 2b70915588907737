"""Settings of a task that are meant for the pods that it starts.

Imported at compile time only: inside a running task `kfp.dsl` lacks these names.
"""

from kfp import dsl

# Addresses and volumes are for the task's own pod too, resources for it alone: the config sizes the others.
# kfp.local passes an empty TaskConfig, so one component serves both runners.
PASSED_ON = tuple(
    dsl.TaskConfigPassthrough(field=field, apply_to_task=own)
    for field, own in (
        (dsl.TaskConfigField.KUBERNETES_NODE_SELECTOR, False),
        (dsl.TaskConfigField.KUBERNETES_TOLERATIONS, False),
        (dsl.TaskConfigField.KUBERNETES_AFFINITY, False),
        (dsl.TaskConfigField.RESOURCES, True),
        (dsl.TaskConfigField.ENV, True),
        (dsl.TaskConfigField.KUBERNETES_VOLUMES, True),
    )
)
