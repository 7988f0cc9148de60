def function_20(x):
    return x + 20
def function_20(x):
    return x + 20
def function_20(x):
    return x + 20
def function_20(x):
    return x + 20
def function_20(x):
    return x + 20
