# Installs a build and makes the README's C++ quick start with it, as a project of its own:
#   cmake -DBUILD=... -DSOURCE=... -DGENERATOR=... -P install.cmake
set(work "${BUILD}/consumer")
file(REMOVE_RECURSE "${work}")
file(COPY "${SOURCE}/tests/consumer/CMakeLists.txt" DESTINATION "${work}")

file(READ "${SOURCE}/README.md" readme)
set(fence "```cpp\n")
string(FIND "${readme}" "${fence}" begin)
if(begin EQUAL -1)
  message(FATAL_ERROR "README.md has no C++ quick start")
endif()
string(LENGTH "${fence}" length)
math(EXPR begin "${begin} + ${length}")
string(SUBSTRING "${readme}" ${begin} -1 code)
string(FIND "${code}" "```" end)
string(SUBSTRING "${code}" 0 ${end} code)
file(WRITE "${work}/quick_start.cpp" "${code}")

function(run)
  execute_process(COMMAND ${ARGV} COMMAND_ERROR_IS_FATAL ANY)
endfunction()
run("${CMAKE_COMMAND}" --install "${BUILD}" --prefix "${work}/prefix")
run("${CMAKE_COMMAND}" -S "${work}" -B "${work}/build" -G "${GENERATOR}"
  "-DCMAKE_PREFIX_PATH=${work}/prefix")
run("${CMAKE_COMMAND}" --build "${work}/build")
run("${work}/build/quick_start")
run("${work}/prefix/bin/gdn" --version)
