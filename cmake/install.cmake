# What 'cmake --install' puts down: public headers, libraries, the command and the CMake package.
include(CMakePackageConfigHelpers)

add_library(gdn::gdn ALIAS gdn)
install(TARGETS gdn gdn_ops gdn_options EXPORT gdn
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}
  ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
if(TARGET gdn_cli)
  install(TARGETS gdn_cli RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
endif()

# Kernels, the command and what operators are made of are internal.
install(DIRECTORY "${PROJECT_SOURCE_DIR}/src/" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}/gdn"
  FILES_MATCHING PATTERN "*.h"
  PATTERN "kernels" EXCLUDE
  PATTERN "cli" EXCLUDE
  REGEX "/ops/(cuda|utils)$" EXCLUDE
  REGEX "/ops/.*/(core|dispatch|cross_entropy_rows)\\.h$" EXCLUDE)

set(package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/gdn")
install(EXPORT gdn NAMESPACE gdn:: DESTINATION "${package_dir}" FILE gdn-targets.cmake)
string(REGEX MATCH "^[0-9.]+" torch_version "${LibTorch_VERSION}")  # without +cu130, say
configure_package_config_file("${PROJECT_SOURCE_DIR}/cmake/gdn-config.cmake.in"
  "${PROJECT_BINARY_DIR}/gdn-config.cmake" INSTALL_DESTINATION "${package_dir}")
write_basic_package_version_file("${PROJECT_BINARY_DIR}/gdn-config-version.cmake"
  COMPATIBILITY SameMinorVersion)
install(FILES
  "${PROJECT_BINARY_DIR}/gdn-config.cmake"
  "${PROJECT_BINARY_DIR}/gdn-config-version.cmake"
  "${PROJECT_SOURCE_DIR}/cmake/FindLibTorch.cmake"
  DESTINATION "${package_dir}")
