"""The only place that touches private torch; each function says what it uses.

    dynamo.py     Dynamo's graphs, and what it knows about the frame it is compiling
    aot.py        AOTAutograd: joint graphs, and compilation without Inductor
    inductor.py   Inductor's options, compiler, scheduler and table of lowerings
    kernels.py    kernels, for use inside a lowering
    frames.py     which frames Dynamo compiled and which not, for warnings
    backward.py   the running backward, and DistributedDataParallel
    selfcheck.py  the list of all these interfaces, and an error that names those that are missing

Inductor and AOTAutograd are imported inside functions, so importing this package loads neither.
The package is checked with torch 2.11 to 2.15. It probes for features, and compares no versions.
"""

from grass_fx._torch_compat.aot import (
    GraphPass,
    argument_counts,
    backward_nodes,
    compile_aot_eager,
    gradient_of_input,
    input_position,
    is_fake,
    is_tangent,
    look_at_joint_graph,
    nodes_from_input,
    trace_static,
    without_data,
)
from grass_fx._torch_compat.backward import (
    at_end_of_backward,
    averaged_by,
    current_backward,
    ignore_in_ddp,
    running_ddp,
)
from grass_fx._torch_compat.dynamo import (
    SET_GRAD_ENABLED,
    compiled_apart,
    copy_dynamo_graph,
    current_compilation,
    fake_mode_of,
    input_source,
    managed_by_fsdp,
    mark_added_placeholder,
    module_source,
    name_backend,
    named_backend,
    parameter_name,
    real_value,
    trace_artifact,
)
from grass_fx._torch_compat.frames import (
    Uncompiled,
    compilation_is_off,
    other_backends,
    uncompiled_frames,
)
from grass_fx._torch_compat.fsdp import (
    FSDPWeight,
    fsdp_weight,
    fsdp_weight_of_shard,
    fsdp_weights,
)
from grass_fx._torch_compat.inductor import (
    AFTER,
    BEFORE,
    CUDA_GRAPHS,
    CustomGraphPass,
    combined_kernels,
    compile_inductor,
    has_triton,
    inductor_patches,
    overlapping,
    register_inductor_lowering,
    scheduling_of,
    sort_topologically,
    uses_cuda_graphs,
)
from grass_fx._torch_compat.kernels import (
    choose_kernel,
    extern_kernel,
    get_rows,
    in_runs,
    is_multiple,
    library_call,
    put_rows,
    realized,
    size_hint,
    triton_template,
    tuning_everything,
)
from grass_fx._torch_compat.selfcheck import selfcheck

__all__ = [
    "AFTER",
    "BEFORE",
    "CUDA_GRAPHS",
    "SET_GRAD_ENABLED",
    "CustomGraphPass",
    "GraphPass",
    "Uncompiled",
    "argument_counts",
    "at_end_of_backward",
    "averaged_by",
    "backward_nodes",
    "choose_kernel",
    "combined_kernels",
    "compilation_is_off",
    "compile_aot_eager",
    "compile_inductor",
    "compiled_apart",
    "copy_dynamo_graph",
    "current_backward",
    "current_compilation",
    "extern_kernel",
    "fake_mode_of",
    "get_rows",
    "gradient_of_input",
    "has_triton",
    "ignore_in_ddp",
    "in_runs",
    "inductor_patches",
    "FSDPWeight",
    "fsdp_weight",
    "fsdp_weight_of_shard",
    "fsdp_weights",
    "input_position",
    "input_source",
    "is_fake",
    "is_tangent",
    "is_multiple",
    "library_call",
    "look_at_joint_graph",
    "managed_by_fsdp",
    "name_backend",
    "named_backend",
    "mark_added_placeholder",
    "module_source",
    "nodes_from_input",
    "other_backends",
    "overlapping",
    "parameter_name",
    "put_rows",
    "real_value",
    "realized",
    "register_inductor_lowering",
    "running_ddp",
    "scheduling_of",
    "selfcheck",
    "size_hint",
    "sort_topologically",
    "trace_artifact",
    "trace_static",
    "triton_template",
    "tuning_everything",
    "uncompiled_frames",
    "uses_cuda_graphs",
    "without_data",
]
