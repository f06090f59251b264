# What the Python package holds of a build: cmake --install BUILD --component python.
install(TARGETS gdn_ops LIBRARY DESTINATION gated_deltanet COMPONENT python EXCLUDE_FROM_ALL)

# Highway's few functions that are not inline; found through $ORIGIN in the library's RPATH.
get_target_property(hwy_type hwy::hwy TYPE)
if(hwy_type STREQUAL "SHARED_LIBRARY")
  get_target_property(hwy_library hwy::hwy LOCATION)
  get_filename_component(hwy_file "${hwy_library}" REALPATH)
  string(REGEX MATCH "^.*\\.so\\.[0-9]+" hwy_soname "${hwy_file}")
  get_filename_component(hwy_soname "${hwy_soname}" NAME)
  install(FILES "${hwy_file}" DESTINATION gated_deltanet RENAME "${hwy_soname}"
    COMPONENT python EXCLUDE_FROM_ALL)
endif()
