"""Published training methods as callbacks that attach to any LightningModule.

Importing the package loads nothing heavy: take what you need from `lightning_methods.callbacks`,
`lightning_methods.functional`, `lightning_methods.modules`, `lightning_methods.metrics`,
`lightning_methods.datamodules` or `lightning_methods.mixins`.
"""

__version__ = "0.1.0"
