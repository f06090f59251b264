# The Python package out of the build folder GDN_BUILT_IN, without compiling.
add_custom_target(gdn_ops)  # the target that pip asks for
install(CODE "execute_process(COMMAND \"${CMAKE_COMMAND}\" --install \"${GDN_BUILT_IN}\"
    --component python --prefix \"\${CMAKE_INSTALL_PREFIX}\" COMMAND_ERROR_IS_FATAL ANY)"
  COMPONENT python)
