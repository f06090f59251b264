# Finds the libtorch inside a Python environment's torch package.
#
# torch's own CMake package demands a CUDA toolkit when torch was built with CUDA, also for
# programs that use no CUDA at all. This module names just the files that we need.
#
# Input:   GDN_PYTHON, the interpreter whose torch is used (default: that of a pip build,
#          then .venv/bin/python, then python3)
# Targets: LibTorch::cpu   the CPU library with its headers
#          LibTorch::cuda  the CUDA library; only where torch was built with CUDA
# Output:  LibTorch_VERSION, LibTorch_ROOT

if(NOT GDN_PYTHON)
  if(SKBUILD)  # pip's build has chosen
    set(_gdn_python "${PYTHON_EXECUTABLE}")
  elseif(EXISTS "${PROJECT_SOURCE_DIR}/.venv/bin/python")
    set(_gdn_python "${PROJECT_SOURCE_DIR}/.venv/bin/python")
  else()
    find_program(_gdn_python NAMES python3 python NO_CACHE)
  endif()
  set(GDN_PYTHON "${_gdn_python}" CACHE FILEPATH "Python interpreter whose torch is used")
endif()

# find_spec, not import: importing torch takes seconds.
execute_process(
  COMMAND "${GDN_PYTHON}" -c
    "import importlib.util as u, pathlib, re; p = pathlib.Path(u.find_spec('torch').origin).parent; print(p); print(re.search(r\"__version__ = '([^']+)'\", (p / 'version.py').read_text()).group(1))"
  OUTPUT_VARIABLE _gdn_torch OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
string(REPLACE "\n" ";" _gdn_torch "${_gdn_torch}")
list(LENGTH _gdn_torch _gdn_torch_length)
if(_gdn_torch_length EQUAL 2)
  list(GET _gdn_torch 0 LibTorch_ROOT)
  list(GET _gdn_torch 1 LibTorch_VERSION)
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(LibTorch
  REQUIRED_VARS LibTorch_ROOT
  VERSION_VAR LibTorch_VERSION
  FAIL_MESSAGE "no torch in the Python environment of '${GDN_PYTHON}': run 'make setup', or pass -DGDN_PYTHON=/path/to/python")

if(LibTorch_FOUND AND NOT TARGET LibTorch::cpu)
  # at::parallel_for is an OpenMP loop in torch's headers; its runtime is the one torch brought, so
  # that a process has only one.
  find_package(OpenMP REQUIRED COMPONENTS CXX)
  file(GLOB _gdn_openmp "${LibTorch_ROOT}/lib/libgomp*.so*" "${LibTorch_ROOT}.libs/libgomp*.so*")
  if(NOT _gdn_openmp)
    set(_gdn_openmp ${OpenMP_CXX_LIBRARIES})
  endif()
  add_library(LibTorch::c10 SHARED IMPORTED)
  set_target_properties(LibTorch::c10 PROPERTIES IMPORTED_LOCATION "${LibTorch_ROOT}/lib/libc10.so")
  add_library(LibTorch::cpu SHARED IMPORTED)
  set_target_properties(LibTorch::cpu PROPERTIES
    IMPORTED_LOCATION "${LibTorch_ROOT}/lib/libtorch_cpu.so"
    INTERFACE_COMPILE_DEFINITIONS "_GLIBCXX_USE_CXX11_ABI=1"
    INTERFACE_COMPILE_OPTIONS "${OpenMP_CXX_FLAGS}"
    INTERFACE_INCLUDE_DIRECTORIES
      "${LibTorch_ROOT}/include;${LibTorch_ROOT}/include/torch/csrc/api/include"
    INTERFACE_LINK_LIBRARIES "LibTorch::c10;${_gdn_openmp}")
  if(EXISTS "${LibTorch_ROOT}/lib/libtorch_cuda.so")
    # libtorch_cuda registers CUDA with torch when it is loaded, so it must be, even where none of its
    # symbols is used.
    add_library(LibTorch::cuda INTERFACE IMPORTED)
    set_target_properties(LibTorch::cuda PROPERTIES
      INTERFACE_LINK_LIBRARIES "LibTorch::cpu"
      INTERFACE_LINK_OPTIONS
        "LINKER:--push-state,--no-as-needed;${LibTorch_ROOT}/lib/libtorch_cuda.so;${LibTorch_ROOT}/lib/libc10_cuda.so;LINKER:--pop-state")
  endif()
endif()
