"""Settings of a task that are meant for the pods that it starts.

Imported at compile time only: inside a running task `kfp.dsl` lacks these names.
"""

from kfp import dsl

# Addresses and volumes are for the task's own pod too, resources for it alone: the config sizes the others.
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
