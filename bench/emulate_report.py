"""What the CUDA kernels move, counted from executing them under emulation, against the bytes that have to move.

Run: make emulate-report     (python bench/emulate_report.py [--quick] [--kernels project ...] [--output FOLDER])

Every kernel is executed at each node shape of `mbv2-7` by a tracing build of the emulation (tests/emulation/trace),
and FOLDER (bench/results/emulated) gets traffic.json, which this describes, and traffic.md, its table. Nothing here has
run on a GPU, and nothing is a time.

The device is one multiprocessor of an H100, with its shared memory, and 8 images: what each of 132 has of 1,056 images.
Blocks are thus cut as they are there; where a kernel's plan can be asked for, it is asked for both and compared.

traffic.json:
    command, machine: how and where it was made
    device: {"multiprocessors", "shared_bytes_per_block", "stands_for": {"multiprocessors", "images"}}
    limits: of the verdicts, by their names
    launches: a list with an entry for every launch of a kernel, all counts of that launch
        kernel: as csrc/cuda/kernels.h calls it; a call of finish_map with moments is two launches, and so is one of
            path_cross_entropy
        function: the __global__ function, without template arguments
        name: the shape in words, unique for a kernel: "56x32 t3 k7 s1"
        shape: the members of the kernel's struct that are numbers ("height", "in_channels", "hidden_channels",
            "kernel", "stride", "pixels", "channels", "activation", ...)
        images: of the launch; null for kernels that know none
        grid, block: three numbers each; blocks, threads: their products (threads: of a block)
        dynamic_shared_bytes, static_shared_bytes: of a block
        barriers: __syncthreads that were completed, of all blocks
        warp: {"barriers", "shuffles", "matrix_products"}: operations of warps (__syncwarp; shuffles and votes;
            mma.m16n8k16). Loads of matrices (ldmatrix.x4) are requests of `shared`
        buffers: by name ("x", "d", "y", "weights", "partials", ...), what happened to each range of global memory:
            role: "stream" (maps: x, d, y, logits, ...), "parameters", or "partials"
            bytes: its size
            floor_read, floor_written: bytes that have to be read and written: each input once, each output once
            read, written: {
                requests: instructions of warps
                lane_bytes: what their active lanes asked for
                sectors: of 32 bytes that the requests touched
                ideal_sectors: the fewest that hold the same bytes, request by request
                launch_bytes, launch_sectors: different ones in the launch: a cache that never forgets
                block_bytes, block_sectors: different ones in each block, summed over the blocks
            } (an atomic operation counts as both)
        shared: by kind of request ("load", "store", "matrix" for ldmatrix.x4, "async" for the shared side of cp.async):
            requests, lane_bytes
            wavefronts: passes over the 32 banks; 8 and 16 bytes a lane go by half and quarter warps, a matrix at a time
            ideal_wavefronts: the same without conflicts
            ways: the largest conflict
        conflicts: source lines with conflicts, the costliest first: {"line": "expand_depthwise.cuh:243", "kind",
            "bytes" a lane, "requests", "wavefronts", "ideal_wavefronts", "ways", "by_ways": requests by their ways}
        verdicts: by limit, {"value", "limit", "met", "why" where it is not met}; see LIMITS
Bytes and sectors of a launch grow with images where blocks do; parameters are read by every block.
"""
